"""Layers that end, and weights that come again: nothing waits for the cyclic collector, and addresses that a graph holds stay valid."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from moe_backend_plugin.errors import CheckpointError

from .test_moe_blackwell import emulation, same_scale  # noqa: F401  a fixture
from .test_moe_hopper import kernels  # noqa: F401  a fixture
from .test_moe_layer import build, experts, inputs, run

PROVIDERS = ("torch", "hopper", "blackwell")


@pytest.fixture(params=PROVIDERS)
def provider(request):
    """vLLM as if on that machine, and what a checkpoint's tensors are there."""
    if request.param == "hopper":
        request.getfixturevalue("kernels")
    elif request.param == "blackwell":
        request.getfixturevalue("emulation")
    return request.param


@pytest.fixture
def no_collector():
    """Only counts of references free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors_of(provider: str, seed: int) -> dict[str, torch.Tensor]:
    found, _ = experts(seed)
    return same_scale(found) if provider == "blackwell" else found


def forward(vllm_config, runner) -> torch.Tensor:
    from vllm.forward_context import set_forward_context

    x, logits = inputs()
    with set_forward_context(None, vllm_config, num_tokens=x.shape[0]):
        return runner(x.clone(), logits)


def test_a_layer_dies_with_its_last_reference(vllm_config, provider, no_collector, request):
    """A wrapper that holds a runner that holds the wrapper keeps graphs and weights until the collector comes, which may be never."""
    runner = build(vllm_config, renormalize=True)
    run(vllm_config, runner, tensors_of(provider, 0), *inputs())
    layer = runner.routed_experts
    if provider == "blackwell":
        request.getfixturevalue("emulation").calls.clear()  # which hold the weights
    watched = {"method": weakref.ref(layer.quant_method), "weights": weakref.ref(layer.w13_weight.untyped_storage())}
    # vLLM's own lists of layers.
    context = vllm_config.compilation_config.static_forward_context
    for name in [name for name, held in context.items() if held in (runner, layer)]:
        del context[name]
    del runner, layer
    assert {name: ref() for name, ref in watched.items()} == dict.fromkeys(watched)


def test_weights_are_loaded_again_in_place(vllm_config, provider):
    """vLLM's reload: the same addresses, the other weights' output, and the first ones' bits when these come back."""
    from vllm.model_executor.model_loader import reload

    runner = build(vllm_config, renormalize=True)
    layer = runner.routed_experts
    reload.record_metadata_for_reloading(layer)
    first, second = tensors_of(provider, 0), tensors_of(provider, 7)
    before = run(vllm_config, runner, first, *inputs())
    places = {name: (parameter.data_ptr(), tuple(parameter.shape)) for name, parameter in layer.named_parameters()}
    assert places

    def again(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        reload.initialize_layerwise_reload(layer)
        assert list(layer.load_weights(tensors.items()))
        reload.finalize_layerwise_reload(layer, None)
        assert {name: (parameter.data_ptr(), tuple(parameter.shape)) for name, parameter in layer.named_parameters()} == places
        return forward(vllm_config, runner)

    other = build(vllm_config, renormalize=True)
    expected = run(vllm_config, other, second, *inputs())
    assert not torch.equal(before, expected)
    assert torch.equal(again(second), expected)
    assert torch.equal(again(first), before)


def test_weights_that_come_again_must_be_whole(vllm_config, provider):
    from vllm.model_executor.model_loader import reload

    runner = build(vllm_config)
    layer, tensors = runner.routed_experts, tensors_of(provider, 0)
    reload.record_metadata_for_reloading(layer)
    run(vllm_config, runner, tensors, *inputs())
    reload.initialize_layerwise_reload(layer)
    missing = "3.up_proj.weight"
    list(layer.load_weights((name, tensor) for name, tensor in tensors.items() if name != missing))
    with pytest.raises(CheckpointError, match=r"3\.up_proj\.weight: found no such tensor"):
        reload.finalize_layerwise_reload(layer, None)
