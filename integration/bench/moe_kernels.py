"""Times single variants of the expert kernels, to choose between them: what the heuristic in moe/tiles.py rests on.

    python integration/bench/moe_kernels.py --model qwen3-30b-a3b --tokens 1,8,64 --variants "tile_tokens=8,k_groups=4,stages=10;..."

Prints, for each, microseconds, TB/s of packed weights (active experts once), TFLOP/s, and the relative error against float32.

With ``--experts 16 --warm`` the layer has fewer experts, whose weights fit in the L2 cache, and every variant is timed twice: with weights
of its own a launch that come from memory, and with one set that the launch before left in the cache. What does not shrink there is not
bound by memory. An H200 has 60 MB of cache in two halves: try fewer experts too. Fewer tokens in proportion keep the tokens an expert.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import cutlass
import cutlass.cute as cute
import torch

from moe_backend_plugin.bench.moe import MODELS, random_checkpoint
from moe_backend_plugin.bench.timing import LAUNCHES, Clock
from moe_backend_plugin.kernels import compile as kernels
from moe_backend_plugin.kernels.moe_gemm import MoeGemm, Variant
from moe_backend_plugin.moe.problem import MoEProblem
from moe_backend_plugin.moe.route import route_reference
from moe_backend_plugin.nvfp4 import hopper

PROBLEMS = {name: model.problem for name, model in MODELS.items()} | {"tiny": MoEProblem(6, 6, 272, 144, 3)}


def problem_of(model: str, experts: int | None) -> MoEProblem:
    """The model's layer, with fewer experts if asked."""
    problem = PROBLEMS[model]
    return dataclasses.replace(problem, num_experts=experts, num_local_experts=experts) if experts else problem


def routing(problem: MoEProblem, tokens: int, tile: int, device: str) -> dict[str, torch.Tensor | int]:
    """What the routing kernel lists."""
    ids = torch.rand(tokens, problem.num_experts, device=device).topk(problem.top_k, dim=1).indices
    order, _, tiles, counts = route_reference(ids, problem.num_local_experts, tile)
    if not len(tiles):
        tiles = torch.zeros(1, 4, dtype=torch.int32, device=device)
    _, pairs, active, _ = counts.tolist()
    return {"order": order, "tiles": tiles, "counts": counts, "pairs": pairs, "active": active}


@cute.jit
def raw_codes(self, word, scale, bits, start: cutlass.Constexpr[int], live):
    """Instead of MoeGemm.dequantise: no arithmetic worth the name."""
    for k in cutlass.range_constexpr(4):
        for n in cutlass.range_constexpr(4):
            bits[start + 4 * k + n] = word[k] ^ scale[n % 2]


@cute.jit
def no_product(self, acc, bits, start: cutlass.Constexpr[int], tokens):
    """Instead of MoeGemm.multiply: something that needs all the fragments."""
    found = bits[start]
    for n in cutlass.range_constexpr(15):
        found = found ^ bits[start + 1 + n]
    acc[0] = acc[0] + found.to(cutlass.Float32)


def ablate(what: str) -> None:
    """Take a part out of the kernels that this process compiles from here on; results are wrong, times say what the part costs."""
    if "dequantise" in what:
        MoeGemm.dequantise = raw_codes
    if "product" in what:
        MoeGemm.multiply = no_product
    if "fence" in what:
        cute.arch.fence_proxy = lambda *_, **__: None
    kernels.FORMAT = f"ablated-{what}"


class Case:
    def __init__(self, model: str, experts: int | None = None, sets: int = 1, device: str = "cuda") -> None:
        self.problem = p = problem_of(model, experts)
        self.hidden, self.width, self.top_k = p.hidden, p.intermediate, p.top_k
        self.device = device
        self.padded = -(-self.width // 64) * 64
        checkpoint = random_checkpoint(p, torch.device(device))
        self.packed = {
            "gate_up": hopper.pack(checkpoint.w13, checkpoint.w13_scale, gated=True),
            "down": hopper.pack(checkpoint.w2, checkpoint.w2_scale, gated=False),
        }
        # Launches with weights of their own; where there are many experts, one launch drives the last one's out of the cache.
        self.sets = {use: [packed, *(packed.clone() for _ in range(sets - 1))] for use, packed in self.packed.items()}
        self.scale_2 = {"gate_up": checkpoint.w13_scale_2, "down": checkpoint.w2_scale_2[:, None]}
        self.clock = Clock(torch.device(device))

    @functools.cache  # noqa: B019  one case a process
    def lists(self, tokens: int, tile: int) -> list[dict]:
        return [routing(self.problem, tokens, tile, self.device) for _ in range(LAUNCHES + 1)]

    def dense(self, use: str, expert: int) -> torch.Tensor:
        packed = self.packed[use][expert : expert + 1]
        rows, columns = (2 * self.width, self.hidden) if use == "gate_up" else (self.hidden, self.width)
        return hopper.dequantise(packed, rows, columns, use == "gate_up")[0]

    def run(self, variant: Variant, tokens: int, check: bool, sms: int, warm: bool = False) -> str:
        use = variant.use
        lists = self.lists(tokens, variant.tile_tokens)
        pairs = tokens * self.top_k
        rows, columns = (tokens, self.hidden) if use == "gate_up" else (pairs, self.padded)
        inputs = [torch.randn(rows, columns, device=self.device).bfloat16() for _ in range(min(LAUNCHES + 1, 3))]
        if use == "down":
            for x in inputs:
                x[:, self.width :] = 0
        out = torch.full((pairs, self.padded if use == "gate_up" else self.hidden), float("nan"), device=self.device).bfloat16()
        router = torch.rand(pairs, device=self.device)
        kernel = kernels.load("moe_gemm", variant, "sm_90a")

        sets = self.sets[use][:1] if warm else self.sets[use]

        def launch(i: int) -> None:
            r = lists[i]
            kernel(
                *(inputs[i % len(inputs)], sets[i % len(sets)], self.scale_2[use], router if variant.weighted else None),
                *(r["order"], r["tiles"], r["counts"], None, None, None, out, self.top_k, 1.0, 0.0, float("inf"), sms),
            )

        error = ""
        if check:
            launch(0)
            torch.cuda.synchronize()
            error = f"{self.error(variant, lists[0], inputs[0], router, out):.2e}"
        us = self.clock.time(launch, cold=not warm)
        weights = sum(r["active"] for r in lists[:LAUNCHES]) / LAUNCHES * self.packed[use][0].numel()
        flops = sum(r["pairs"] for r in lists[:LAUNCHES]) / LAUNCHES * 2 * self.hidden * self.width * (2 if use == "gate_up" else 1)
        return f"{us:8.1f} us {weights / us / 1e6:6.2f} TB/s {flops / us / 1e6:7.1f} TFLOP/s  {error}"

    def error(self, variant: Variant, r: dict, x: torch.Tensor, router: torch.Tensor, out: torch.Tensor) -> float:
        """Relative error (norm) of all rows against float32."""
        wanted = torch.zeros(r["pairs"], out.shape[1], device=self.device)
        for expert, first, count, _ in r["tiles"].tolist():
            weight = self.dense(variant.use, expert)
            pair = r["order"][first : first + count].long()
            if variant.use == "gate_up":
                both = x[pair // self.top_k].float() @ weight.T
                gate, up = both[:, : self.width], both[:, self.width :]
                gate, up = gate * self.scale_2["gate_up"][expert, 0], up * self.scale_2["gate_up"][expert, 1]
                wanted[first : first + count, : self.width] = torch.nn.functional.silu(gate) * up
            else:
                y = x[first : first + count, : self.width].float() @ weight.T * self.scale_2["down"][expert]
                wanted[first : first + count] = y * router[pair][:, None]
        found = out[: r["pairs"]].float()
        return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=PROBLEMS)
    parser.add_argument("--tokens", default="1,8,64,256")
    parser.add_argument("--variants", required=True, help="keyword arguments of Variant, variants apart by ';'")
    parser.add_argument("--uses", default="gate_up,down")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--ablate", default="", help="dequantise, product, fence: leave these out")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--experts", type=int, help="instead of the model's")
    parser.add_argument("--warm", action="store_true", help="also time with weights in the L2 cache")
    arguments = parser.parse_args()
    if arguments.ablate:
        ablate(arguments.ablate)
    # "blocks" beside the variant's own fields: thread blocks a multiprocessor.
    chosen = [eval(f"dict({text})") for text in arguments.variants.split(";")]  # noqa: S307  a developer's own command line
    problem, runs = PROBLEMS[arguments.model], []
    for use in arguments.uses.split(","):
        columns = -(-(problem.hidden if use == "gate_up" else problem.intermediate) // 64)
        for fields in chosen:
            own = {name: value for name, value in fields.items() if name != "blocks"}
            variant = Variant(use=use, weighted=use == "down", **own)
            variant = dataclasses.replace(variant, ragged=columns % variant.stage_blocks != 0)
            kernels.store("moe_gemm", variant, "sm_90a")
            runs.append((fields, variant))
    if arguments.compile_only:
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    case = Case(arguments.model, arguments.experts, LAUNCHES + 1 if arguments.warm else 1)
    for tokens in map(int, arguments.tokens.split(",")):
        for fields, variant in runs:
            for warm in (False, True) if arguments.warm else (False,):
                said = case.run(variant, tokens, not arguments.no_check, sms * fields.get("blocks", 1), warm)
                cache = " warm" if warm else ""
                print(f"{variant.use:8s} M {tokens:5d} {said}  {fields} {arguments.ablate}{cache}".replace("'", ""), flush=True)


if __name__ == "__main__":
    main()
