"""Gated-delta-net decode and verification on SGLang's own pool of states, by the tables that its own code writes for a padded graph.

Slots come from SGLang's allocator, rows and padding from its attention backend, the pool's shape and strides from its memory pool; only
the model around them is absent.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from .test_sglang_cpu import HQ, HV, D, expected, verify

SLOTS, LAYERS, STEPS = 6, 2, 3


@pytest.fixture(params=["float32", "bfloat16"])
def pool(published, request, monkeypatch):
    """Room for six requests and their drafts, every slot with a state of its own; the types are those of ``--mamba-ssm-dtype``."""
    from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool

    monkeypatch.setenv("SGLANG_MAMBA_SSM_DTYPE", request.param)  # what SGLang itself does with that flag

    sizes = dict(intermediate_size=HV * D, n_groups=HQ, num_heads=HV, head_dim=D, state_size=D, conv_kernel=4)
    found = HybridReqToTokenPool(
        size=SLOTS,
        mamba_size=SLOTS,
        mamba_spec_state_size=SLOTS,
        max_context_len=16,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=Mamba2StateShape.create(tp_world_size=1, **sizes), layers=list(range(LAYERS))),
        mamba_layer_ids=list(range(LAYERS)),
        enable_mamba_extra_buffer=False,
        speculative_num_draft_tokens=STEPS,
    )
    assert found.mamba_pool.mamba_cache.temporal.dtype is getattr(torch, request.param)
    found.mamba_pool.mamba_cache.temporal.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    return found


@pytest.fixture
def backend(pool, published):
    """SGLang's backend with this package's kernel in its dispatcher, as a server makes it."""
    from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend
    from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend

    triton = LinearAttnKernelBackend.TRITON
    backends = SimpleNamespace(decode=LinearAttnKernelBackend("cutedsl_plugin"), prefill=triton, verify=None)
    runner = dict(server_args=published, device="cpu", is_draft_worker=False, req_to_token_pool=pool, token_to_kv_pool=None)
    return GDNAttnBackend(SimpleNamespace(**runner, linear_attn_backends=backends))


def assert_same_states(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Up to what sums in another order change: of bfloat16, a last bit."""
    bound = 1e-4 if ours.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=1e-4)


def requests(pool) -> torch.Tensor:
    """Rows of three requests, in a pool where others came and went: the last slot is taken, and slots are in no order."""
    first = pool.mamba_allocator.alloc(SLOTS)
    pool.mamba_allocator.free(first[[3, 1]])
    slots = torch.cat([first[[5]], pool.mamba_allocator.alloc(2)]).int()
    rows = torch.tensor([4, 1, 2, 0])
    pool.req_index_to_mamba_index_mapping[rows[:3]] = slots
    assert SLOTS in slots and 0 not in slots and slots.unique().numel() == 3
    return rows


def tokens(count: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(count)
    shapes = dict(mixed=(count, (2 * HQ + HV) * D), a=(count, HV), b=(count, HV), A_log=(HV,), dt_bias=(HV,))
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def test_decode_of_a_padded_graph(pool, backend):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    rows = requests(pool)
    slots = pool.get_mamba_indices(rows[:3]).tolist()
    backend.init_cuda_graph_state(4, 4)
    table = backend._replay_metadata(4, rows, ForwardMode.DECODE, None, None, num_padding=1).mamba_cache_indices
    assert table.tolist() == [*slots, -1] and table.dtype == torch.int32
    before = pool.mamba_pool.mamba_cache.temporal.clone()
    x, states = tokens(4), pool.mamba2_layer_cache(1).temporal
    assert states.data_ptr() == pool.mamba_pool.mamba_cache.temporal[1].data_ptr()
    out = backend.kernel_dispatcher.packed_decode(
        mixed_qkv=x["mixed"],
        a=x["a"],
        b=x["b"],
        A_log=x["A_log"],
        dt_bias=x["dt_bias"],
        ssm_states=states,
        cache_indices=table,
        scale=D**-0.5,
        num_v_heads=HV,
        head_v_dim=D,
        replayssm_d=None,
    )
    theirs = before[1].clone()
    torch.testing.assert_close(out, expected(x, theirs, table, 1, True), rtol=1e-4, atol=1e-4)
    assert_same_states(states, theirs)
    assert not out[0, 3].any() and torch.equal(pool.mamba_pool.mamba_cache.temporal[0], before[0])
    others = [slot for slot in range(SLOTS + 1) if slot not in slots]
    assert torch.equal(states[others], before[1][others]) and not any(torch.equal(states[slot], before[1][slot]) for slot in slots)


def test_verification_of_a_padded_graph(pool, backend):
    """States of drafts go to the buffer's rows in the order of the batch, whatever slots the requests have."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    rows = requests(pool)
    slots = pool.get_mamba_indices(rows[:3]).tolist()
    backend.init_cuda_graph_state(4, 4 * STEPS)
    drafts = SimpleNamespace(draft_token_num=STEPS, ragged_verify_layout=None, retrieve_next_token=None)
    metadata = backend._replay_metadata(4, rows, ForwardMode.TARGET_VERIFY, drafts, None, num_padding=1)
    table, starts = metadata.mamba_cache_indices, metadata.query_start_loc
    # A padded row has no tokens either, so the graph's last tokens belong to nobody.
    assert table.tolist() == [*slots, -1] and starts.tolist() == [0, STEPS, 2 * STEPS, 3 * STEPS, 3 * STEPS]
    cache = pool.mamba2_layer_cache(1)
    assert cache.intermediate_ssm.shape[1:] == (STEPS, HV, D, D)
    cache.intermediate_ssm.fill_(7.0)
    before, x = cache.temporal.clone(), tokens(4 * STEPS)
    rows = backend.verify_intermediate_state_indices[:4]
    out = verify(backend.kernel_dispatcher, x, cache.temporal, table, starts, cache.intermediate_ssm, rows, STEPS)
    live = {name: tensor[: 3 * STEPS] if name in ("mixed", "a", "b") else tensor for name, tensor in x.items()}
    theirs = torch.full((3, STEPS, HV, D, D), 7.0, dtype=before.dtype)
    torch.testing.assert_close(out[:, : 3 * STEPS], expected(live, before, table[:3], STEPS, False, theirs), rtol=1e-4, atol=1e-4)
    assert_same_states(cache.intermediate_ssm[:3], theirs)
    assert torch.equal(cache.temporal, before) and (cache.intermediate_ssm[3:] == 7).all()


def test_verification_of_a_padded_eager_batch(pool, backend):
    """Under DP attention: its padded rows are row 0 of the requests, which has slot 0; the buffer may have no such rows."""
    rows = torch.cat([requests(pool)[:3], torch.zeros(6, dtype=torch.int64)])
    table = pool.get_mamba_indices(rows)
    count, cache = rows.shape[0], pool.mamba2_layer_cache(1)
    assert table[3:].tolist() == [0] * 6 and count > cache.intermediate_ssm.shape[0]
    cache.intermediate_ssm.fill_(7.0)
    before, x = cache.temporal.clone(), tokens(count * STEPS)
    starts = torch.arange(0, count * STEPS + 1, STEPS, dtype=torch.int32)
    rows = backend.verify_intermediate_state_indices[:count]
    out = verify(backend.kernel_dispatcher, x, cache.temporal, table, starts, cache.intermediate_ssm, rows, STEPS)
    assert out[:, : 3 * STEPS].any() and not out[:, 3 * STEPS :].any()
    assert torch.equal(cache.temporal, before) and (cache.intermediate_ssm[3:] == 7).all() and (cache.intermediate_ssm[:3] != 7).any()


def runner(module, **changes):
    """What ``prepare`` reads of SGLang's runner: no configuration of a model."""
    states = SimpleNamespace(temporal=torch.empty(1, HV, D, D), intermediate_ssm=None)
    found = dict(model=module, dtype=torch.bfloat16, is_draft_worker=False)
    pool = SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=states))
    return SimpleNamespace(**found | changes, req_to_token_pool=pool)


@pytest.fixture
def hopper(published, monkeypatch):
    """The kernels that would be compiled for a GPU that can run them."""
    from moe_backend_plugin.engines.sglang import gdn
    from moe_backend_plugin.gdn import cuda
    from moe_backend_plugin.kernels import compile as kernels

    compiled = []
    monkeypatch.setattr(gdn, "choose_provider", lambda *_, **__: SimpleNamespace(provider="cutedsl"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "use_cache_folder", lambda _: None)
    monkeypatch.setattr(cuda, "prepare", lambda layer, *_, **__: compiled.append(layer))
    return compiled


def linear_layer(heads: int = HQ, size: int = D):
    from sglang.srt.layers.radix_linear_attention import RadixLinearAttention

    return RadixLinearAttention(0, heads, heads, HV, size, size, size, dt_bias=torch.zeros(HV))


def test_kernels_are_compiled_for_the_layers_of_any_model(hopper):
    """Of GigaChat too, for whose configuration SGLang's ``hybrid_gdn_config`` has no answer."""
    from moe_backend_plugin.engines.sglang.gdn import prepare

    prepare(runner(torch.nn.ModuleList([linear_layer(), linear_layer()])), False)
    (layer,) = hopper
    assert (layer.heads_per_group, layer.state, layer.bias) == (HV // HQ, torch.float32, torch.float32)


def test_a_model_whose_layers_cannot_be_served_is_refused(hopper):
    from moe_backend_plugin.engines.sglang.gdn import prepare
    from moe_backend_plugin.errors import UnsupportedLayerError

    with pytest.raises(UnsupportedLayerError, match="^--linear-attn-decode-backend cutedsl_plugin: found .*64"):
        prepare(runner(linear_layer(size=64)), False)
    with pytest.raises(UnsupportedLayerError, match="found Linear, whose layers do not call SGLang's gated-delta-net kernels"):
        prepare(runner(torch.nn.Linear(1, 1)), False)
    prepare(runner(torch.nn.Linear(1, 1), is_draft_worker=True), False)
    assert not hopper
