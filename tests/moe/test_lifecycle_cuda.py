"""Layers and graphs on a GPU: both die with their last reference, and weights copied over in place are what a captured graph uses next."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from moe_backend_plugin.moe import balanced
from moe_backend_plugin.moe.problem import MoEProblem
from moe_backend_plugin.nvfp4 import hopper

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("MoE kernels: no GPU of compute capability 9.0", allow_module_level=True)
pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

from moe_backend_plugin.bench.moe import random_checkpoint  # noqa: E402
from moe_backend_plugin.moe import cuda  # noqa: E402

DEVICE = torch.device("cuda", 0)
PROBLEM = MoEProblem(32, 32, 1024, 512, 4)


def packed(seed: int) -> cuda.Weights:
    c = random_checkpoint(PROBLEM, DEVICE, seed)
    return cuda.Weights(
        hopper.pack(c.w13, c.w13_scale, gated=True), c.w13_scale_2, hopper.pack(c.w2, c.w2_scale, gated=False), c.w2_scale_2
    )


def batch(tokens: int = 9):
    x = torch.randn(tokens, PROBLEM.hidden, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).bfloat16()
    return x, *(part.to(DEVICE) for part in balanced.routing(PROBLEM, tokens))


def captured(weights: cuda.Weights, call) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of one call, and where it writes."""
    x, chosen, ids = call
    out, stream, graph = torch.empty_like(x), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cuda.fused_moe(x, weights, chosen, ids, PROBLEM, out)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        cuda.fused_moe(x, weights, chosen, ids, PROBLEM, out)
    return graph, out


@pytest.fixture(autouse=True)
def prepared():
    cuda.prepare(PROBLEM, torch.bfloat16, torch.int32, DEVICE, 64, False)


def test_a_graph_uses_weights_that_were_copied_over_its_own():
    first, second, call = packed(0), packed(1), batch()
    places = [part.data_ptr() for part in first]
    graph, out = captured(first, call)
    eager = {}
    for name, weights in (("first", first), ("second", second)):
        eager[name] = torch.empty_like(out)
        cuda.fused_moe(*(call[0], weights, *call[1:], PROBLEM, eager[name]))
    kept = [part.clone() for part in first]
    graph.replay()
    assert torch.equal(out, eager["first"]) and not torch.equal(eager["first"], eager["second"])
    for source, expected in ((second, "second"), (kept, "first")):
        for place, part in zip(first, source, strict=True):
            place.copy_(part)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager[expected])
    assert places == [part.data_ptr() for part in first]


def test_weights_and_graphs_die_with_their_last_reference():
    """Without the cyclic collector: a layer, its graph and their memory are gone once nobody names them; the arena stays."""
    captured(packed(0), batch())  # whatever is kept for good is made here
    torch.cuda.synchronize()
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        weights = packed(2)
        graph, out = captured(weights, batch())
        graph.replay()
        torch.cuda.synchronize()
        watched = [weakref.ref(graph), *(weakref.ref(part) for part in weights), weakref.ref(out)]
        assert torch.cuda.memory_allocated() > before
        del weights, graph, out
        assert [ref() for ref in watched] == [None] * len(watched)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def test_a_second_set_of_layers_after_the_first_died():
    """What an engine in the same process does after another one."""
    results = []
    for _ in range(2):
        weights, call = packed(0), batch()
        graph, out = captured(weights, call)
        graph.replay()
        torch.cuda.synchronize()
        results.append(out.clone())
        del weights, graph, out
    assert torch.equal(*results)
