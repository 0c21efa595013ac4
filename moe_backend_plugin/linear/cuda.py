"""One dense NVFP4 layer on a Hopper GPU: the expert kernel's second projection, with one expert that every token goes to.

One launch, and nothing else: no allocation, no synchronisation, no question to the device. Which tokens are in which tile depends on
nothing but how many there are, so the lists that the kernel walks are made once, for every number of tokens (:class:`_Lists`).

A routing kernel in front could not make them: this kernel reads its lists while the one in front still runs. In an MoE layer it may,
because the first projection, which waits, stands between it and the routing. Nor could they lie in the experts' arena: an engine runs
shared experts beside the routed ones, on a stream of their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import PluginError
from ..kernels import compile as kernels
from ..moe import cuda as moe
from ..moe import tactics, tiles
from ..moe.problem import MoEProblem
from ..nvfp4 import hopper

ROWS, COLUMNS = range(16, (1 << 19) + 1), range(16, (1 << 15) + 1)
"""Output and input features of a layer. Both are multiples of 16; what the last 64 columns lack the kernel takes as zeros."""


class Weights(NamedTuple):
    """A layer of N output and K input features on this rank.

    packed: uint8 ``hopper.packed_shape(1, N, K, gated=False)``; scale_2: float32 [1, 1], the global scale of all rows.
    """

    packed: Tensor
    scale_2: Tensor


def pack(weight: Tensor, scale: Tensor, scale_2: Tensor) -> Weights:
    """A checkpoint's layer, for many calls: ``weight`` uint8 [N, K/2], ``scale`` float8_e4m3fn [N, K/16], ``scale_2`` float32 [].

    ``weight`` times ``scale`` times ``scale_2`` is the layer. Raises PluginError (a ValueError) if shapes or dtypes disagree.
    """
    if weight.ndim != 2 or scale_2.numel() != 1:
        raise PluginError("weight, scale_2", f"{list(weight.shape)}, {list(scale_2.shape)}", "[N, K/2], one value")
    return Weights(hopper.pack(weight.unsqueeze(0), scale.unsqueeze(0), gated=False), scale_2.float().reshape(1, 1))


def unsupported_reason(rows: int, columns: int, tokens: torch.dtype, activation_precision: str = "bf16") -> str | None:
    """Why the kernels cannot serve a layer of so many output and input features on a Hopper GPU, or None if they can.

    tokens: dtype of input and output; activation_precision: "nvfp4" where the input is to be rounded to NVFP4 (W4A4).
    """
    if activation_precision != "bf16":
        return f"activations in {activation_precision}; the kernels multiply 16-bit activations"
    if tokens not in moe.TOKEN_TYPES:
        return f"activation dtype {tokens}; the kernels serve {', '.join(map(str, moe.TOKEN_TYPES))}"
    for name, size, allowed in (("output", rows, ROWS), ("input", columns, COLUMNS)):
        if size not in allowed or size % 16:
            return f"{size} {name} features on a rank; the kernels serve multiples of 16 from {allowed[0]} to {allowed[-1]}"
    return None


def scales_reason(global_scales: Tensor) -> str | None:
    """Why the kernels cannot serve a fused layer whose parts have these global scales, float32 [parts]; None if they can.

    Waits for the device.
    """
    found = global_scales.tolist()
    if len(set(found)) == 1:
        return None
    return f"parts with different global scales ({', '.join(f'{scale:.9g}' for scale in found)}); the kernels have one factor for all rows"


# --- the choice of kernels --------------------------------------------------------------------------------------------


@lru_cache(1024)
def problem_of(rows: int, columns: int) -> MoEProblem:
    """The MoE layer whose second projection is this layer: every token goes to its one expert, whose output nothing is multiplied by."""
    return MoEProblem(1, 1, rows, columns, 1, apply_router_weight_on_input=True)


def _pieces(shape: tiles.Shape, rows: int, tokens: int) -> int:
    """Tiles of rows by tiles of tokens: what the thread blocks of a call share out."""
    return -(-rows // shape.rows) * -(-tokens // shape.tile_tokens)


@lru_cache(4096)
def choose(rows: int, columns: int, tokens: int, multiprocessors: int) -> tiles.Shape:
    """The kernel for a call of ``tokens`` tokens (1 or more) on a GPU of so many multiprocessors.

    It is that of an MoE layer (:func:`..moe.tiles.choose`), where its pieces give every thread block work. One expert may leave most
    of them idle: then it is the shape of the least cost by the same figures, of all that are shipped. No figure was measured on dense
    layers.
    """
    shape = tiles.choose.__wrapped__(problem_of(rows, columns), tokens, multiprocessors).down

    def cost(shape: tiles.Shape) -> float:
        a_weight = shape.blocks * tiles.COSTS[shape.tile_tokens]
        return a_weight * tiles.busiest(shape, -(-tokens // shape.tile_tokens), rows, columns, multiprocessors)

    enough = _pieces(shape, rows, tokens) >= multiprocessors * shape.blocks
    return shape if enough else min(tactics.SHIPPED, key=cost)


@lru_cache(256)
def shapes(rows: int, columns: int, max_tokens: int, multiprocessors: int) -> tuple[tiles.Shape, ...]:
    """Every shape that calls of 1 .. ``max_tokens`` tokens can meet."""
    found = (choose.__wrapped__(rows, columns, tokens, multiprocessors) for tokens in range(1, max_tokens + 1))
    return tuple(dict.fromkeys(found))


def variants(rows: int, columns: int, tokens: torch.dtype, max_tokens: int, multiprocessors: int) -> Iterator:
    """Every kernel that calls of up to ``max_tokens`` tokens can launch, once each."""
    from ..kernels.moe_gemm import Variant

    for shape in shapes(rows, columns, max_tokens, multiprocessors):
        yield Variant(**moe.variant_fields(problem_of(rows, columns), "down", shape, tokens))


@cache
def prepare(rows: int, columns: int, tokens: torch.dtype, device: torch.device, max_tokens: int) -> int:
    """Compile and load every kernel that calls of up to ``max_tokens`` tokens can launch, and make the lists long enough.

    ``device``: with its index. Returns how many kernels had to be compiled.
    """
    multiprocessors = moe.multiprocessors_of(device.index)
    needed = variants(rows, columns, tokens, max_tokens, multiprocessors)
    compiled = kernels.prepare(moe.GEMM, needed, kernels.device_architecture(device.index, moe.ARCHITECTURES))
    for shape in shapes(rows, columns, max_tokens, multiprocessors):
        _Lists.get(device, shape.tile_tokens, max_tokens)
    return compiled


# --- lists of tiles ---------------------------------------------------------------------------------------------------


class _Lists:
    """The tiles of a certain size of every number of tokens, on one device; all layers share them.

    The tile that is not full comes first. So all numbers of tokens that leave as many over have one list, and each walks a
    different length of it: the lists take 16 bytes for each of the most tokens that they are made for.

    Nothing here is written again once it was made. Where more tokens come, longer lists take its place; the former ones stay for
    good, because graphs hold their addresses.

    So they must outlast an engine's sleep. What an engine allocates while it loads a model comes from a memory pool whose contents it
    gives up when it sleeps without its weights; but a pool serves the thread that opened it, and these are made in another.
    """

    _made: ClassVar[dict[tuple[torch.device, int], _Lists]] = {}
    _kept: ClassVar[list[_Lists]] = []
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device, tile_tokens: int, max_tokens: int) -> None:
        self.tile_tokens, self.most = tile_tokens, -(-max_tokens // tile_tokens)
        with ThreadPoolExecutor(1) as thread:
            self.tiles, self.counts = thread.submit(self._make, device).result()

    def _make(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the thread's, which ends with this
        tile_tokens = self.tile_tokens
        first = torch.arange(1, tile_tokens + 1, dtype=torch.int32).view(-1, 1)  # tokens of the first tile
        tiles = torch.zeros(tile_tokens, self.most, 4, dtype=torch.int32)  # expert, first token, tokens, 0
        tiles[:, 1:, 1] = first + torch.arange(self.most - 1, dtype=torch.int32) * tile_tokens
        tiles[:, :1, 2], tiles[:, 1:, 2] = first, tile_tokens
        counts = torch.zeros(self.most + 1, 4, dtype=torch.int32)  # tiles, and what only combining looks at
        counts[:, 0] = torch.arange(self.most + 1, dtype=torch.int32)
        # Copying waits until they are there, for every stream. Inference mode, in which tensors of no use outside of it would be made,
        # is of the other thread as well, and so is torch's default device.
        return tiles.to(device), counts.to(device)

    @classmethod
    def get(cls, device: torch.device, tile_tokens: int, tokens: int) -> _Lists:
        """Lists for calls of up to ``tokens`` tokens. Raises RuntimeError if they would have to be made while a graph is captured."""
        with cls._lock:
            found = cls._made.get((device, tile_tokens))
            if found is None or found.most * tile_tokens < tokens:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"tile lists of {device}: found {found.most * tile_tokens if found else 0} tokens while a graph is captured, and a "
                        f"call of {tokens}; allowed: making them before capture only, so prepare for the largest call at start"
                    )
                found = cls._made[device, tile_tokens] = cls(device, tile_tokens, tokens)
                cls._kept.append(found)
            return found

    def of(self, tokens: int) -> tuple[Tensor, Tensor]:
        """(tiles int32 [T, 4], counts int32 [4]) of a call of ``tokens`` tokens (1 or more)."""
        tiles = -(-tokens // self.tile_tokens)
        over = tokens - (tiles - 1) * self.tile_tokens
        return self.tiles[over - 1, :tiles], self.counts[tiles]


# --- the call ---------------------------------------------------------------------------------------------------------


def _gemm(device: int, rows: int, columns: int, shape: tiles.Shape, tokens: torch.dtype) -> Callable:
    return moe.gemm(device, problem_of(rows, columns), "down", shape, tokens)


class _Call(NamedTuple):
    """What calls of one size have in common."""

    tiles: Tensor
    counts: Tensor
    kernel: Callable
    packed: tuple[int, ...]
    blocks: int


@lru_cache(4096)
def _call(device: torch.device, rows: int, columns: int, tokens: int, dtype: torch.dtype) -> _Call:
    if reason := unsupported_reason(rows, columns, dtype):
        raise PluginError("x, out", reason, "a layer that unsupported_reason lets through")
    multiprocessors = moe.multiprocessors_of(device.index)
    shape = choose(rows, columns, tokens, multiprocessors)
    return _Call(
        *_Lists.get(device, shape.tile_tokens, tokens).of(tokens),
        _gemm(device.index, rows, columns, shape, dtype),
        hopper.packed_shape(1, rows, columns, gated=False),
        min(multiprocessors * shape.blocks, _pieces(shape, rows, tokens)),
    )


def nvfp4_linear(x: Tensor, weights: Weights, out: Tensor) -> None:
    """``out`` [M, N] = ``x`` [M, K] times the layer's weights, both bf16 or both fp16, rows of unit stride and 16-byte aligned.

    Products are summed in float32, scaled and rounded once. With the number of tokens fixed, a token's result does not depend on the
    other tokens. Raises PluginError (a ValueError) if shapes or dtypes disagree or :func:`unsupported_reason` has one, RuntimeError
    where a graph is captured and :func:`prepare` has not seen so many tokens.
    """
    (tokens, columns), rows = x.shape, out.shape[-1]
    if out.shape != (tokens, rows) or out.dtype is not x.dtype:
        raise PluginError("out", f"{out.dtype} {list(out.shape)}", f"{x.dtype} [{tokens}, N]")
    if tokens == 0:
        return
    call = _call(x.device, rows, columns, tokens, x.dtype)
    if weights.packed.shape != call.packed:
        raise PluginError("weights.packed", str(list(weights.packed.shape)), f"{list(call.packed)} for {rows} rows, {columns} columns")
    # Tokens are taken as they come, so the kernel reads no order; it wants one all the same.
    lists = call.counts, call.tiles, call.counts
    call.kernel(x, weights.packed, weights.scale_2, None, *lists, None, None, None, out, 1, 1.0, 0.0, math.inf, call.blocks)
