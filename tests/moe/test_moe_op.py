"""The operator as torch sees it: its schema, its place in torch.compile, and the memory it keeps."""

import gc
import sys
import threading
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from moe_cases import make_layer, make_tokens

from moe_backend_plugin import moe
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.linear.scratch import SCRATCH_VALUES, scratch
from moe_backend_plugin.moe import op as op_module
from moe_backend_plugin.moe import reference
from moe_backend_plugin.moe.op import nvfp4_moe_packed
from moe_backend_plugin.moe.problem import Activation
from moe_backend_plugin.nvfp4 import hopper

OP = torch.ops.moe_backend_plugin.nvfp4_moe.default


def arguments(layer, batch):
    a = layer.problem.activation
    return (batch[0], *layer.prepared, *batch[1:], a.kind, a.alpha, a.beta, a.limit)


@pytest.mark.parametrize("kind", ["plain", "expert map", "w4a4", "relu2"])
def test_opcheck(kind):
    activation = Activation("relu2") if kind == "relu2" else Activation("silu", limit=2.0)
    layer = make_layer(activation=activation, expert_range=(1, 4) if kind == "expert map" else None, w4a4=kind == "w4a4")
    batch = make_tokens(layer, 5)
    # test_schema compares inputs with allclose, which torch lacks for float8; that inputs do not change is tested with the results.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, arguments(layer, batch), layer.scales, test_utils=utils)


def test_schema():
    arguments = {a.name: a for a in OP._schema.arguments}
    assert not any(a.alias_info for a in arguments.values()), "the op changes none of its inputs"
    assert list(arguments)[9:13] == ["activation", "alpha", "beta", "limit"]


def test_the_result_is_fresh():
    layer = make_layer()
    batch = make_tokens(layer, 3, torch.float32)
    first = layer.op(*batch)
    kept = first.clone()
    layer.op(batch[0] * 2, *batch[1:])
    assert torch.equal(first, kept)


def test_opaque_to_torch_compile():
    layer = make_layer()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, w, i: layer.op(x + 1, w, i) * 2, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (4, 9):
        x, weights, ids = make_tokens(layer, tokens)
        assert torch.equal(compiled(x, weights, ids), layer.op(x + 1, weights, ids) * 2)
    assert any(node.target is OP for node in graphs[0].graph.nodes)


def test_meta_shape():
    layer = make_layer()
    batch = make_tokens(layer, 3)
    real = arguments(layer, batch)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in real]
        out = OP(*fake)
    assert out.shape == batch[0].shape and out.dtype == batch[0].dtype and out.is_contiguous()


def float_bytes() -> int:
    """Bytes of all live float tensors."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.dtype in (torch.float32, torch.bfloat16, torch.float16):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_no_dequantised_weights_outlive_a_call():
    layers = [make_layer(experts=8, hidden=256, intermediate=128, seed=s) for s in range(4)]
    x, weights, ids = make_tokens(layers[0], 64)
    out = layers[0].op(x, weights, ids)
    scratch(1)
    before = float_bytes()
    for layer in layers:
        out = layer.op(x, weights, ids)
    assert float_bytes() - before <= out.nbytes, "eight experts would be 3 MB in float32"
    assert scratch(1).untyped_storage().nbytes() == SCRATCH_VALUES * 4


def test_peak_memory_is_bounded_whatever_the_layer(monkeypatch):
    """Every float buffer of a call: the weights of all experts in float32 are far more than all of them."""
    layer = make_layer(experts=32, hidden=512, intermediate=256, top_k=1)
    x, weights, ids = make_tokens(layer, 64)
    call = arguments(layer, (x, weights, ids))
    OP(*call)
    with torch.profiler.profile(profile_memory=True) as profile:
        OP(*call)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    every_expert = 32 * 3 * 512 * 256 * 4
    assert 0 < peak < every_expert / 8


def test_threads_have_a_scratch_each():
    layers = [make_layer(experts=4, seed=s) for s in range(4)]
    batches = [make_tokens(layer, 20, seed=s) for s, layer in enumerate(layers)]
    want = [layer.op(*batch) for layer, batch in zip(layers, batches, strict=True)]
    wrong = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(layers[i].op(*batches[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_before_and_after():
    layer = make_layer()
    batch = make_tokens(layer, 4)
    want = layer.op(*batch)

    def in_a_new_thread() -> None:
        with torch.inference_mode():
            results.append(layer.op(*batch))
        results.append(layer.op(*batch))

    results: list[torch.Tensor] = []
    thread = threading.Thread(target=in_a_new_thread)
    thread.start()
    thread.join()
    assert len(results) == 2 and all(torch.equal(r, want) for r in results)


# --- the operator of the Hopper kernels, over a stand-in for them ----------------------------------------------------------------------

PACKED = torch.ops.moe_backend_plugin.nvfp4_moe_packed.default


@pytest.fixture
def packed_layer(monkeypatch):
    """A layer in the kernels' order of weights, and the problems that the kernels were called for."""
    module, problems = ModuleType("moe_backend_plugin.moe.cuda"), []

    class Weights(NamedTuple):
        w13: torch.Tensor
        w13_scale_2: torch.Tensor
        w2: torch.Tensor
        w2_scale_2: torch.Tensor

    def fused_moe(x, weights, topk_weights, topk_ids, problem, out, expert_map=None):
        problems.append(problem)
        w13 = hopper.unpack(weights.w13, problem.w13_rows, problem.hidden, problem.activation.gated)
        w2 = hopper.unpack(weights.w2, problem.hidden, problem.intermediate, False)
        tensors = (*w13, weights.w13_scale_2, *w2, weights.w2_scale_2)
        out.copy_(reference.fused_moe(x, *tensors, topk_weights, topk_ids, problem, expert_map))

    module.Weights, module.fused_moe = Weights, fused_moe
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(moe, "cuda", module, raising=False)

    def make(**options):
        layer = make_layer(**options)
        w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 = layer.weights
        w13 = hopper.pack(w13, w13_scale, gated=layer.problem.activation.gated)
        return layer, Weights(w13, w13_scale_2, hopper.pack(w2, w2_scale, gated=False), w2_scale_2)

    return make, problems


@pytest.mark.parametrize("expert_range", [None, (1, 4)])
@pytest.mark.parametrize("activation", [Activation("silu", limit=2.0), Activation("relu2"), Activation("swigluoai", 1.702, 1.0, 7.0)])
def test_the_packed_call_is_the_layer(packed_layer, activation, expert_range):
    make, problems = packed_layer
    layer, weights = make(activation=activation, expert_range=expert_range)
    x, topk_weights, ids = make_tokens(layer, 9)
    out = nvfp4_moe_packed(x, weights, topk_weights, ids, layer.problem, layer.expert_map)
    # Blocks whose scale was zero come back with another one, over codes that are zero.
    assert torch.equal(out, layer.reference(x, topk_weights, ids))
    assert problems == [layer.problem]
    # The dispatcher's path rebuilds the problem from the schema's numbers.
    p, a = layer.problem, layer.problem.activation
    numbers = (p.num_experts, p.intermediate, a.kind, a.alpha, a.beta, a.limit)
    assert torch.equal(op_module._packed(x, *weights, topk_weights, ids, *numbers, expert_map=layer.expert_map), out)
    assert problems == [layer.problem] * 2


def test_the_packed_call_checks_what_differs_from_call_to_call(packed_layer):
    make, problems = packed_layer
    layer, weights = make()
    x, topk_weights, ids = make_tokens(layer, 5)
    for bad in ((x[:, :-16], topk_weights, ids), (x[:4], topk_weights, ids), (x, topk_weights[:, :1], ids), (x[0], topk_weights, ids)):
        with pytest.raises(PluginError):
            nvfp4_moe_packed(bad[0], weights, *bad[1:], layer.problem)
    empty = nvfp4_moe_packed(x[:0], weights, topk_weights[:0], ids[:0], layer.problem)
    assert empty.shape == (0, layer.problem.hidden) and not problems


def test_the_packed_call_is_opaque_to_torch_compile(packed_layer):
    make, problems = packed_layer
    layer, weights = make()

    def step(x, topk_weights, ids):
        return nvfp4_moe_packed(x + 1, weights, topk_weights, ids, layer.problem) * 2

    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in make_tokens(layer, 7)]
        graph = torch.fx.experimental.proxy_tensor.make_fx(step)(*fake).graph
    nodes = [node for node in graph.nodes if node.target is PACKED]
    assert len(nodes) == 1 and nodes[0].meta["val"].shape == (7, layer.problem.hidden) and not problems
    assert not any(a.alias_info for a in PACKED._schema.arguments), "the op changes none of its inputs"
