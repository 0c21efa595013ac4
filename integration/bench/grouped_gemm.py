"""Expert layers for many tokens: this package's kernels beside weights that are dequantised to bf16 and multiplied by a grouped GEMM.

    python integration/bench/grouped_gemm.py [--model qwen3-30b-a3b] [--tokens 2048,65536] [--seconds 120] [--out FILE]

plugin: the whole layer, sorting included, as ``moe-backend bench moe`` times it.

dequantised: every local expert's weights to bf16, into buffers that all layers share; tokens gathered in their experts' order; a grouped
GEMM; the activation; a grouped GEMM; the weighted sum of each token's rows. "us" is all of it in one graph; each part is also timed alone.
Whatever can be argued about is in its favour:

* sorting is left out: order, positions and offsets are there before the clock starts;
* the weights lie as a checkpoint has them, so dequantising reads and writes in one order; the plugin's packed form would need a transpose;
* for each of the two products the faster of torch's grouped GEMM (CUTLASS on sm_90) and quack-kernels' is taken, where that is installed;
* "bound_us" is dequantising and the two products alone, as if gather, activation and sum cost nothing, and "gemms_us" the products alone,
  as if dequantising were hidden behind something else.

Both have balanced routing, weights and inputs of their own a launch and a cold cache, by the clock of the other benchmarks. Outputs are
compared with the float32 reference first; a wrong one ends the script. The most tokens go first: they are what the question is about.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grouped_gemm_report import GEMMS, NAMED, PROVIDERS, TABLE, crossing, table  # noqa: E402

from moe_backend_plugin.bench import moe as bench  # noqa: E402
from moe_backend_plugin.bench.shared import first_line, release  # noqa: E402
from moe_backend_plugin.moe import reference, route  # noqa: E402
from moe_backend_plugin.moe.problem import Activation, MoEProblem  # noqa: E402
from moe_backend_plugin.moe.routing import local_ids  # noqa: E402
from moe_backend_plugin.nvfp4.unscaled import unscaled  # noqa: E402

TOKENS = tuple(2**i for i in range(11, 17))
SECONDS = 120.0
ROWS_COMPARED = 64
BOUNDS = dict(zip(PROVIDERS, (bench.BOUNDS["plugin"], bench.BOUNDS["triton_bf16"]), strict=True))
"""The alternative rounds where vLLM's unquantised layers round."""
PARTS = ("dequantise", "gather", "gate_up", "activation", "down", "combine")


class Plan(NamedTuple):
    """Pairs sorted by expert. token: int64 [pairs], of each row; position: int32 [M, k], a pair's row or -1; offsets: int32 [E], where
    an expert's rows end; starts: int32 [E + 1], the same with the 0 in front."""

    token: Tensor
    position: Tensor
    offsets: Tensor
    starts: Tensor


def sort_pairs(ids: Tensor, problem: MoEProblem, expert_map: Tensor | None) -> Plan:
    experts = problem.num_local_experts
    order, position, _, _ = route.route_reference(ids, experts, ids.numel(), expert_map)
    counts = torch.bincount(local_ids(ids, experts, expert_map).view(-1), minlength=experts + 1)[:experts]
    offsets = counts.cumsum(0).int()
    return Plan(order.long() // problem.top_k, position.view(ids.shape), offsets, torch.nn.functional.pad(offsets, (1, 0)))


# --- the parts, in plain torch; grouped_gemm_kernels.py has them for a GPU -----------------------------------------------------------


class Torch:
    @staticmethod
    def dequantise(packed: Tensor, scale: Tensor, scale_2: Tensor, out: Tensor) -> Tensor:
        """bf16 weights [E, R, K]; scale_2 [E] or [E, 2], one for each half of the rows."""
        values = unscaled(packed, scale).view(scale_2.numel(), -1) * scale_2.view(-1, 1)
        return out.copy_(values.view(out.shape))

    @staticmethod
    def activate(both: Tensor, activation: Activation, out: Tensor) -> Tensor:
        """gate and up [rows, 2I] to [rows, I]."""
        return out.copy_(activation.apply(both.float()))

    @staticmethod
    def combine(y: Tensor, position: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """Each token's rows of y times their router weights, in slot order, in float32, rounded once."""
        rows = torch.where(position[..., None] >= 0, y[position.clamp(min=0).long()].float(), 0.0)
        total = torch.zeros(out.shape, device=out.device)
        for slot in range(position.shape[1]):
            total += weights[:, slot, None] * rows[:, slot]
        return out.copy_(total)


def parts_for(device: torch.device) -> Any:
    if device.type == "cpu":
        return Torch
    import grouped_gemm_kernels

    return grouped_gemm_kernels


Grouped = Callable[[Tensor, Tensor, Plan], Tensor]
"""(rows [P, K] sorted by expert, weights [E, N, K], plan) -> [P, N]."""


def grouped_torch(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    return torch._grouped_mm(rows, weights.transpose(1, 2), offs=plan.offsets)


def grouped_gemms(tune: bool) -> dict[str, Grouped]:
    """Those that can be imported; ``tune``: quack-kernels tries its configurations for every shape, which takes minutes."""
    found: dict[str, Grouped] = {"torch": grouped_torch}
    try:
        from quack.gemm_interface import gemm
    except Exception as error:  # noqa: BLE001  another project's import may raise anything
        print(f"quack-kernels is left out: {first_line(error)}")
    else:
        found["quack"] = lambda rows, weights, plan: gemm(rows, weights.transpose(1, 2), cu_seqlens_m=plan.starts, tuned=tune)
    return found


# --- the alternative as a layer ------------------------------------------------------------------------------------------------------


class Buffers(NamedTuple):
    """bf16 weights of one layer, which the layers of a model take in turn: [E, 2I, H] and [E, H, I]."""

    w13: Tensor
    w2: Tensor

    @classmethod
    def make(cls, problem: MoEProblem, device: torch.device) -> Buffers:
        shapes = (problem.w13_rows, problem.hidden), (problem.hidden, problem.intermediate)
        return cls(*(torch.empty(problem.num_local_experts, *shape, dtype=bench.DTYPE, device=device) for shape in shapes))


class Case:
    """One cell's inputs and buffers; every method is one part of launch ``i``."""

    def __init__(self, cell: bench.Cell, inputs: bench.Inputs, sets: list[bench.Checkpoint], buffers: Buffers, grouped: dict) -> None:
        model, device = bench.MODELS[cell.model], inputs.device
        self.cell, self.inputs, self.sets, self.buffers, self.grouped = cell, inputs, sets, buffers, grouped
        self.problem, self.parts = model.problem, parts_for(device)
        self.plans = [sort_pairs(ids, self.problem, model.expert_map(device)) for ids in inputs.ids]
        most = max(len(plan.token) for plan in self.plans)
        widths = self.problem.hidden, self.problem.w13_rows, self.problem.intermediate, self.problem.hidden
        self._rows, self._both, self._h, self._y = (torch.zeros(most, width, dtype=bench.DTYPE, device=device) for width in widths)

    def dequantise(self, i: int) -> None:
        found = self.sets[set_of(self.cell, i, len(self.sets))]
        self.parts.dequantise(found.w13, found.w13_scale, found.w13_scale_2, self.buffers.w13)
        self.parts.dequantise(found.w2, found.w2_scale, found.w2_scale_2, self.buffers.w2)

    def gather(self, i: int) -> Tensor:
        token = self.plans[i].token
        return torch.index_select(self.inputs.x[i], 0, token, out=self._rows[: len(token)])

    def gate_up(self, i: int, by: str) -> Tensor:
        return self.grouped[by](self._rows[: len(self.plans[i].token)], self.buffers.w13, self.plans[i])

    def activation(self, i: int, both: Tensor | None = None) -> Tensor:
        count = len(self.plans[i].token)
        return self.parts.activate(self._both[:count] if both is None else both, self.problem.activation, self._h[:count])

    def down(self, i: int, by: str) -> Tensor:
        return self.grouped[by](self._h[: len(self.plans[i].token)], self.buffers.w2, self.plans[i])

    def combine(self, i: int, y: Tensor | None = None) -> Tensor:
        inputs, y = self.inputs, self._y if y is None else y
        return self.parts.combine(y, self.plans[i].position, inputs.weights[i], inputs.out[i])

    def layer(self, i: int, gate_up: str, down: str) -> Tensor:
        """The whole of it, by the grouped GEMMs named."""
        self.dequantise(i)
        self.gather(i)
        self.activation(i, self.gate_up(i, gate_up))
        return self.combine(i, self.down(i, down))

    def keep(self, by: str) -> None:
        """What a part that is timed alone reads: launch 0's results of the parts before it."""
        count = len(self.plans[0].token)
        self.dequantise(0)
        self.gather(0)
        self._both[:count] = self.gate_up(0, by)
        self.activation(0)
        self._y[:count] = self.down(0, by)

    def time(self, clock: Any) -> dict[str, Any]:
        """Columns of the row, and "us"."""

        def us(launch: Callable[[int], object]) -> float:
            return round(clock.time(launch, self.inputs.warm, self.cell.launches), 3)

        self.keep(next(iter(self.grouped)))
        found: dict[str, Any] = {f"{part}_us": us(getattr(self, part)) for part in PARTS if part not in GEMMS}
        for part in GEMMS:
            times = {name: us(partial(getattr(self, part), by=name)) for name in self.grouped}
            by = min(times, key=times.__getitem__)
            found |= {f"{part}_us": times[by], f"{part}_by": by, **{f"{part}_{name}_us": took for name, took in times.items()}}
        return {"us": us(partial(self.layer, gate_up=found["gate_up_by"], down=found["down_by"])), **found}


def set_of(cell: bench.Cell, i: int, sets: int) -> int:
    """The set of weights of launch ``i``: the launch before the timed ones takes the first, those take the next."""
    return (i + 1) % (cell.launches + 1) % sets


def columns(model: bench.Model, pairs: float, found: dict[str, Any]) -> dict[str, Any]:
    """What the alternative's row has beside the common fields."""
    both = found["gate_up_us"] + found["down_us"]
    moved = model.local * model.expert_weights * (bench.NVFP4_BYTES + bench.BF16_BYTES)
    flops = {"gate_up": bench.operations(model, pairs) * 2 / 3, "down": bench.operations(model, pairs) / 3}
    return {
        **{name: value for name, value in found.items() if name != "us"},
        "gemms_us": round(both, 3),
        "bound_us": round(found["dequantise_us"] + both, 3),
        "dequantise_TB_s": round(moved / found["dequantise_us"] / 1e6, 4),
        **{f"{part}_TFLOP_s": round(flops[part] / found[f"{part}_us"] / 1e6, 3) for part in GEMMS},
        "buffer_bytes": model.set_bytes("triton_bf16"),
    }


# --- the run -------------------------------------------------------------------------------------------------------------------------


def error_of(name: str, output: Tensor, rows: Tensor, expected: Tensor) -> float:
    """The relative error of ``rows``; ends the script if it is too large, or any row at all is not finite."""
    if not output.isfinite().all():
        raise SystemExit(f"{name}: rows that are not finite")
    provider = name.split()[0]
    error = bench.relative_error(output[rows], expected)
    if not error <= BOUNDS[provider]:
        raise SystemExit(f"{name}: relative error {error:.1e}, bound {BOUNDS[provider]:.1e}")
    return error


def measure(cell: bench.Cell, sets: list[bench.Checkpoint], layers: list[bench.Layer], buffers: Buffers, grouped: dict, clock: Any) -> list:
    """Both providers' rows of one cell, once both are right; a grouped GEMM that raises is taken out of ``grouped``."""
    model = bench.MODELS[cell.model]
    inputs = bench.Inputs(cell, sets[0].w13.device)
    case = Case(cell, inputs, sets, buffers, grouped)

    def ours(i: int) -> Tensor:
        return layers[set_of(cell, i, len(layers))](inputs.x[i], inputs.weights[i], inputs.ids[i], inputs.out[i])

    # Rows from first to last: an offset that overflows does so at the end. The last launch takes the set that the reference has.
    last, count = cell.launches, min(ROWS_COMPARED, cell.tokens)
    rows = torch.arange(count, device=inputs.device) * cell.tokens // count
    x, weights, ids = (part[last][rows] for part in (inputs.x, inputs.weights, inputs.ids))
    expected = reference.fused_moe(x, *sets[0], weights, ids, model.problem, model.expert_map(inputs.device)).float()
    inputs.out[last].fill_(float("nan"))
    errors = {"plugin": error_of(f"plugin {cell}", ours(last), rows, expected)}
    for name in list(grouped):
        inputs.out[last].fill_(float("nan"))
        try:
            output = case.layer(last, name, name)
        except Exception as error:  # noqa: BLE001  as above; torch's own has to run
            if name == "torch":
                raise
            print(f"{name}'s grouped GEMM is left out: {first_line(error)}")
            del grouped[name]
            continue
        found = error_of(f"dequantised {name} {cell}", output, rows, expected)
        errors["dequantised"] = max(found, errors.get("dequantised", 0.0))
    us = clock.time(ours, inputs.warm, cell.launches)
    found = case.time(clock)
    row = partial(bench.row, cell, active=inputs.active, pairs=inputs.pairs)
    return [
        row("plugin", us=us, relative_error=errors["plugin"]),
        row("dequantised", us=found["us"], relative_error=errors["dequantised"]) | columns(model, inputs.pairs, found),
    ]


def run(name: str, tokens: Iterable[int], tune: bool, seconds: float, result: dict, clock: Any, device: torch.device) -> Iterator[None]:
    """Fill ``result``; yields after each cell."""
    cells = [bench.Cell(name, count, "balanced") for count in sorted(set(tokens), reverse=True)]
    model, wanted = bench.MODELS[name], max(cell.launches for cell in cells) + 1
    checkpoint = bench.random_checkpoint(model.problem, device)
    copies = bench.copies_that_fit(model, PROVIDERS, torch.cuda.mem_get_info(device)[0], wanted)
    layers = bench.plugin_layers(model, checkpoint, copies, cells[0].tokens, device)
    sets = [checkpoint, *(bench.Checkpoint(*(part.clone() for part in checkpoint)) for _ in range(copies - 1))]
    buffers, grouped = Buffers.make(model.problem, device), grouped_gemms(tune)
    deadline = time.monotonic() + seconds
    for cell in cells:
        if time.monotonic() > deadline:
            result["dropped"].append({"model": model.name, "tokens": cell.tokens, "ep": model.ep, "why": "no time"})
            continue
        rows = measure(cell, sets, layers, buffers, grouped, clock)
        result["rows"] = rows + result["rows"]
        print(f"{cell}: {', '.join('{provider} {us:.0f}'.format(**row) for row in rows)} us", flush=True)
        release()
        yield


def main() -> None:
    from stamp import gpu_stamp

    from moe_backend_plugin.bench.report import write
    from moe_backend_plugin.bench.stamp import results_folder, slug
    from moe_backend_plugin.bench.timing import Clock, copy_tb_s, matmul_tflop_s
    from moe_backend_plugin.cli.output import print_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=bench.MODELS)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no number of tokens is begun after so many, once all is compiled")
    parser.add_argument("--tune-quack", action="store_true", help="let quack-kernels choose its configurations by timing them")
    parser.add_argument("--out", type=Path, help="JSON file; default: grouped_gemm_<device>.json among the results")
    arguments = parser.parse_args()
    stamp = gpu_stamp(__file__, bench.KERNELS)
    out, device = arguments.out or results_folder() / f"grouped_gemm_{slug(stamp['device'])}.json", torch.device("cuda", 0)
    ceilings = {"copy_TB_s": round(copy_tb_s(device), 4), "matmul_TFLOP_s": round(matmul_tflop_s(device), 1)}
    release()
    clock = Clock(device)
    ceilings |= {"empty_us": round(clock.empty_us(), 3), "l2_bytes": clock.l2_bytes}
    result: dict[str, Any] = {"stamp": stamp, "ceilings": ceilings, "rows": [], "dropped": []}
    for _ in run(arguments.model, map(int, arguments.tokens.split(",")), arguments.tune_quack, arguments.seconds, result, clock, device):
        write(result, out)
    write(result, out)
    print_table(f"{arguments.model}, us a call; {ceilings}", TABLE, table(result["rows"]))
    for column, named in NAMED.items():
        print(crossing(result["rows"], column, named))
    buffers = bench.MODELS[arguments.model].set_bytes("triton_bf16")
    print(f"The bf16 buffers take {buffers} bytes beside the packed weights, once for all layers.")
    print(f"{out}: {len(result['rows'])} rows; dropped: {[entry['tokens'] for entry in result['dropped']] or 'none'}")


if __name__ == "__main__":
    main()
