"""The end of a mixture-of-experts layer: a token's output is the sum of its pairs' rows, in the order of its slots.

The rows are in sorted order (by expert), already multiplied by the router weight; ``position`` says where a pair's row is, -1 where
no local expert answered. A block serves a range of columns of one token. A thread holds 16 bytes of a row, and has the loads of
many rows on their way before it adds the first; sums are fp32, in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

TYPES = {"float32": cutlass.Float32, "bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}
MAX_TOP_K = 32


@dataclass(frozen=True)
class Variant:
    """What is fixed when the kernel is compiled.

    rows, tokens: element types of the pairs' rows ("float32", "bfloat16", "float16") and of the output ("bfloat16", "float16").
    top_k: slots of a token.
    threads: threads of a block; loads: the most 16-byte loads that a thread has on their way.
    """

    rows: str = "bfloat16"
    tokens: str = "bfloat16"
    top_k: int = 8
    threads: int = 128
    loads: int = 8

    def __post_init__(self) -> None:
        for name, allowed in (("top_k", range(1, MAX_TOP_K + 1)), ("loads", range(1, 33))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)}, allowed 1..{allowed[-1]}")
        if self.threads % 32 or not 32 <= self.threads <= 1024:
            raise ValueError(f"threads: found {self.threads}, allowed multiples of 32 up to 1024")


class MoECombine:
    """The kernel of one ``Variant``; calling it (inside ``cute.compile``) launches it on every token of ``out``."""

    def __init__(self, variant: Variant, architecture: str) -> None:
        self.variant = variant
        self.rows = TYPES[variant.rows]
        self.tokens = TYPES[variant.tokens]
        self.vec = 128 // self.rows.width  # columns of a thread
        self.together = max(1, min(variant.top_k, variant.loads))  # slots whose loads are on their way at once

    @cute.jit
    def __call__(
        self,
        y: cute.Tensor,  # [>= P, H]
        position: cute.Tensor,  # [>= M k]
        out: cute.Tensor,  # [M, H]
        stream: cuda.CUstream,
    ):
        self.kernel(y, position, out).launch(
            grid=[out.shape[0], cute.ceil_div(out.shape[1], self.variant.threads * self.vec), 1],
            block=[self.variant.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, y: cute.Tensor, position: cute.Tensor, out: cute.Tensor):
        cute.arch.griddepcontrol_launch_dependents()
        vec, k = self.vec, self.variant.top_k
        thread = cute.arch.thread_idx()[0]
        token, part, _ = cute.arch.block_idx()
        column = (part * self.variant.threads + thread) * vec
        cute.arch.griddepcontrol_wait()
        if column < out.shape[1]:
            places = cute.make_rmem_tensor(k, Int32)
            align = min(16, k * 4 & -(k * 4))
            cute.autovec_copy(cute.make_tensor(self.pointer(position, Int64(token) * k, align), cute.make_layout(k)), places)
            total = cute.make_rmem_tensor(vec, Float32)
            total.fill(0.0)
            for first in cutlass.range_constexpr(0, k, self.together):
                slots = min(self.together, k - first)
                raw = cute.make_rmem_tensor((vec, slots), self.rows)
                raw.fill(0.0)
                for slot in cutlass.range_constexpr(slots):
                    # The same answer for the whole block. Few loads become predicated, four or more stay behind a branch; loads
                    # predicated one by one would let the compiler add the first rows before it asks for the last.
                    if places[first + slot] >= 0:
                        row = Int64(places[first + slot]) * y.stride[0] + column
                        cute.autovec_copy(cute.make_tensor(self.pointer(y, row, 16), cute.make_layout(vec)), raw[None, slot])
                for slot in cutlass.range_constexpr(slots):
                    value = cute.make_rmem_tensor(vec, Float32)
                    value.store(raw[None, slot].load().to(Float32))
                    for n in cutlass.range_constexpr(vec):
                        total[n] += value[n]
            converted = cute.make_rmem_tensor(vec, self.tokens)
            converted.store(total.load().to(self.tokens))
            target = self.pointer(out, Int64(token) * out.stride[0] + column, vec * self.tokens.width // 8)
            cute.autovec_copy(converted, cute.make_tensor(target, cute.make_layout(vec)))

    @cute.jit
    def pointer(self, tensor: cute.Tensor, offset: Int64, align: cutlass.Constexpr[int]) -> cute.Pointer:
        """``offset`` elements into ``tensor``, with an alignment (bytes) that the offset is known to keep."""
        return cute.make_ptr(tensor.element_type, (tensor.iterator + offset).toint(), cute.AddressSpace.gmem, assumed_align=align)


KERNEL = MoECombine


def fake_arguments(variant: Variant) -> list:
    """Tensors without memory that say which types, strides and alignments the compiled kernel accepts; sizes are free."""

    def fake(dtype: str, rank: int):
        kind = TYPES[dtype]
        strides = tuple(cute.sym_int64(divisibility=128 // kind.width) for _ in range(rank - 1))
        return cute.runtime.make_fake_tensor(kind, tuple(cute.sym_int() for _ in range(rank)), (*strides, 1), assumed_align=16)

    return [
        fake(variant.rows, 2),
        cute.runtime.make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=16),
        fake(variant.tokens, 2),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    ]
