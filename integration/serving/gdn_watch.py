"""Runs in the engine's process: checks every call of this package's gated-delta-net path against the fp32 reference.

Each call works on a block pool that it shares with everything else the engine keeps.  Before a call the whole pool is
copied; afterwards the call's own rows are computed again, on the copy and in plain fp32.  Where the call wrote, the two must
agree to rounding; all other bytes of the pool must be the same.  Rows that vLLM prefills in the same call are vLLM's.

The convolution's output is bfloat16, and its last bit the kernel's own choice, so the delta rule is checked on the output that
it was given (``state_error``, ``out_error``).  There the step size is rounded as vLLM's CPU kernel does
(``reference.vllm_step_size``); ``fp32_error`` is the states' distance from fp32 in everything, inputs to state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend_plugin.engines.vllm import gdn_cpu
from moe_backend_plugin.gdn import reference
from moe_backend_plugin.gdn.slots import NullRule, PoolLayout, Slots


@dataclass
class Row:
    """One request's tokens in a call, by vLLM's metadata: which slots it reads and writes."""

    tokens: torch.Tensor
    conv: int
    read: int
    write: list[int]
    accepted: int | None = None


class Watch:
    """While it is entered, all layers of this process are watched; ``report`` says what was seen."""

    def __init__(self) -> None:
        self.report = {"calls": 0, "mixed_calls": 0, "rows": 0, "rows_with_drafts": 0, "rows_after_accepted_drafts": 0}
        self.report |= {"conv_error": 0.0, "state_error": 0.0, "out_error": 0.0, "fp32_error": 0.0, "slots": 0, "foreign": []}

    def __enter__(self) -> Watch:
        self._originals = gdn_cpu._without_drafts, gdn_cpu._with_drafts
        gdn_cpu._without_drafts = self._around(self._originals[0], rows_without_drafts)
        gdn_cpu._with_drafts = self._around(self._originals[1], rows_with_drafts)
        return self

    def __exit__(self, *_: object) -> None:
        gdn_cpu._without_drafts, gdn_cpu._with_drafts = self._originals

    def _around(self, original, rows_of):
        def call(layer, m, mixed_qkv, b, a, out) -> None:
            pools = gdn_cpu._pools(layer)
            raw = torch.empty(0, dtype=torch.uint8).set_(pools[0].untyped_storage())
            copy = raw.clone()
            convolved: list[torch.Tensor] = []
            decode = gdn_cpu.gdn_decode

            def note(x: torch.Tensor, *args, **options) -> torch.Tensor:
                convolved.append(x)
                return decode(x, *args, **options)

            gdn_cpu.gdn_decode = note
            try:
                original(layer, m, mixed_qkv, b, a, out)
            finally:
                gdn_cpu.gdn_decode = decode
            self._compare(layer, *rows_of(m), (mixed_qkv, b, a, out), convolved, pools, raw, copy)

        return call

    def _compare(self, layer, rows: list[Row], prefills: list[int], tensors: tuple, convolved: list, pools: tuple, raw, copy) -> None:
        mixed_qkv, b, a, out = tensors
        conv, states = (torch.empty(0, dtype=p.dtype).set_(copy.untyped_storage(), p.storage_offset(), p.shape, p.stride()) for p in pools)
        report = self.report
        report["slots"] = conv.shape[0]
        report["calls"] += 1
        report["mixed_calls"] += bool(rows and prefills)
        at = 0
        for row in rows:
            x, gates = convolve(layer, row, mixed_qkv[row.tokens], conv), (b[row.tokens], a[row.tokens])
            before = {slot: states[slot].clone() for slot in {row.read, *row.write}}
            recur(layer, row, x, *gates, states, as_vllm=False)
            self._most("fp32_error", [(pools[1][slot], states[slot]) for slot in row.write])
            for slot, kept in before.items():
                states[slot] = kept
            found, at = convolved[0][at : at + len(row.tokens)], at + len(row.tokens)
            self._most("conv_error", [(found, x)])
            expected = recur(layer, row, found, *gates, states, as_vllm=True)
            report["rows"] += 1
            report["rows_with_drafts"] += len(row.write) > 1
            report["rows_after_accepted_drafts"] += (row.accepted or 1) > 1
            self._most("out_error", [(out[row.tokens], expected)])
            for slot in row.write:
                self._most("state_error", [(pools[1][slot], states[slot])])
                states[slot] = pools[1][slot]  # compared: what is left of the slot must be the same bit for bit
        blocks, expected = (bytes_.view(conv.shape[0], -1) for bytes_ in (raw, copy))
        changed = (blocks != expected).any(1).nonzero().flatten().tolist()
        report["foreign"] += [f"{layer.prefix}: slot {slot}, call {report['calls']}" for slot in changed if slot not in prefills][:20]

    def _most(self, name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.report[name] = max([self.report[name], *(distance(*pair) for pair in pairs)])


def rows_without_drafts(m) -> tuple[list[Row], list[int]]:
    slots = m.non_spec_state_indices_tensor.tolist()
    rows = [Row(torch.tensor([i]), slot, slot, [slot]) for i, slot in enumerate(slots[: m.num_decodes])]
    return rows, slots[m.num_decodes : m.num_decodes + m.num_prefills]


def rows_with_drafts(m) -> tuple[list[Row], list[int]]:
    bounds = m.spec_query_start_loc.tolist()
    alone = m.num_prefills == 0 and m.num_decodes == 0
    order = torch.arange(bounds[-1]) if alone else m.spec_token_indx.long()
    rows = []
    for i, columns in enumerate(m.spec_state_indices_tensor[: m.num_spec_decodes].tolist()):
        begin, end = bounds[i : i + 2]
        accepted = int(m.num_accepted_tokens[i])
        # The last call left the state after its token t in column t.
        rows.append(Row(order[begin:end], columns[0], columns[accepted - 1], columns[: end - begin], accepted))
    return rows, [] if alone else m.prefill_state_indices.tolist()


def place(pool: torch.Tensor, order: str, read: int, write: int | list[int]) -> Slots:
    return Slots(torch.tensor([read]), torch.tensor([write]), PoolLayout.of(pool, order), NullRule.BLOCK_ZERO, isinstance(write, int))


def convolve(layer, row: Row, x: torch.Tensor, conv: torch.Tensor) -> torch.Tensor:
    """The row's convolution by the reference, on the copy ``conv``: [tokens, channels]."""
    weight, bias = layer.conv1d.weight.flatten(1), layer.conv1d.bias
    if getattr(layer.conv1d, "_cpu_unpacked_conv_weight", None) is not None:  # vLLM has packed the parameter for its own kernel
        weight = layer.conv1d._cpu_unpacked_conv_weight
    accepted = None if row.accepted is None else torch.tensor([row.accepted])
    slot = place(conv, "VK", row.conv, row.conv)
    return reference.conv_update(x[None], conv, weight, bias, slot, num_accepted=accepted, activation=layer.activation)[0]


def recur(layer, row: Row, x: torch.Tensor, b: torch.Tensor, a: torch.Tensor, states: torch.Tensor, *, as_vllm: bool) -> torch.Tensor:
    """The row's delta rule by the reference, on the copy ``states``; returns its output."""
    heads_v, v, k = states.shape[1:]
    heads_k = (x.shape[-1] - heads_v * v) // (2 * k)
    q, key, value = x[None].split([heads_k * k, heads_k * k, heads_v * v], dim=-1)
    q, key, value = (part.unflatten(-1, (-1, size)) for part, size in ((q, k), (key, k), (value, v)))
    slots = place(states, "KV", row.read, row.write)
    return reference.gdn_decode(q, key, value, a[None], b[None], layer.A_log, layer.dt_bias, states, slots, as_vllm=as_vllm)[0]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the size of what is expected; infinite where something is no number."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(float("inf")))
