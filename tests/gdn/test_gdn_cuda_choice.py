"""What surrounds the GPU kernels and needs no GPU: which layers they take, which variant a call launches, and that it was compiled."""

from __future__ import annotations

import pytest
import torch

from moe_backend_plugin.gdn import cuda, support
from moe_backend_plugin.kernels import gdn_decode
from moe_backend_plugin.kernels.gdn_decode import Variant

QWEN = dict(head_k=128, head_v=128, key_heads=16, value_heads=32, state=torch.float32, tokens=torch.bfloat16)


def test_heads_are_judged_as_the_kernel_is_written():
    assert support.HEAD == gdn_decode.HEAD


def test_qwen_layers_are_taken():
    assert cuda.unsupported_reason(**QWEN) is None
    assert cuda.unsupported_reason(**{**QWEN, "state": torch.bfloat16, "value_heads": 64}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_k": 64}, ["K=64", "K=V=128"]),
        ({"head_v": 256}, ["V=256", "K=V=128"]),
        ({"value_heads": 80}, ["80 value heads on 16", "1, 2, 3, 4, 8"]),
        ({"value_heads": 24}, ["24 value heads on 16"]),
        ({"key_heads": 0}, ["on 0 key heads"]),
        ({"state": torch.float8_e4m3fn}, ["float8_e4m3fn", "float32, bfloat16, float16"]),
        ({"tokens": torch.float32}, ["torch.float32", "bfloat16, float16"]),
    ],
)
def test_other_layers_are_left_with_a_reason(change, words):
    reason = cuda.unsupported_reason(**{**QWEN, **change})
    assert reason and all(word in reason for word in words)


@pytest.mark.parametrize("state", cuda.STATE_TYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_every_tile_a_call_can_choose_is_compiled_ahead(state, ragged):
    layer = cuda.Layer(state, torch.bfloat16, torch.bfloat16, heads_per_group=2)
    compiled = {(v.tile_v, v.warps) for v in layer.variants(speculative=True) if v.ragged == ragged}
    chosen = {cuda.tile_for(state.itemsize, work, ragged) for work in (*range(1, 5000), 1 << 20)}
    assert chosen == compiled


def test_without_drafts_no_ragged_kernel_is_compiled():
    layer = cuda.Layer(torch.float32, torch.bfloat16, torch.bfloat16, heads_per_group=4, norm="silu")
    variants = list(layer.variants(speculative=False))
    assert not any(v.ragged for v in variants)
    assert {v.norm for v in variants} == {"", "silu"} and {v.heads_per_group for v in variants} == {4}
    assert not any(v.ragged and v.norm for v in layer.variants(speculative=True, verify=True)), "drafts have the norm behind them"


@pytest.mark.parametrize(("accepted", "norm"), [(False, ""), (False, "silu"), (True, "")])  # with drafts no engine folds the norm
@pytest.mark.parametrize("state", cuda.STATE_TYPES)
def test_what_a_call_launches_is_compiled_ahead(state, accepted, norm, monkeypatch):
    launched = []
    monkeypatch.setattr(cuda.kernels, "load", lambda family, variant, arch: launched.append(variant) or (lambda *args: None))
    monkeypatch.setattr(cuda.kernels, "device_architecture", lambda device: "sm_90a")
    cuda._kernel.cache_clear()
    layer = cuda.Layer(state, torch.bfloat16, torch.float32, heads_per_group=4, index=torch.int64, norm="silu", norm_weight=torch.float32)
    heads, tokens, table = 4, 3, torch.ones(3, dtype=torch.int64)
    extra = dict(gate=torch.empty(tokens, heads, 128), norm_weight=torch.empty(128)) if norm else {}
    if accepted:
        drafts = torch.ones(3, 2, dtype=torch.int64)
        extra |= dict(write=drafts, cu_seqlens=torch.arange(4), num_accepted=table, max_tokens=2)
    cuda.decode(
        mixed_qkv=torch.empty(tokens, (2 + heads) * 128, dtype=torch.bfloat16),
        a=torch.empty(tokens, heads),
        b=torch.empty(tokens, heads),
        A_log=torch.empty(heads),
        dt_bias=torch.empty(heads),
        pool=torch.empty(4, heads, 128, 128, dtype=state),
        read=drafts if accepted else table,
        out=torch.empty(tokens, heads, 128),
        **extra,
    )
    cuda._kernel.cache_clear()
    (variant,) = launched
    assert variant in set(layer.variants(speculative=True))
    assert (variant.norm, variant.accepted) == (norm, accepted)


@pytest.mark.parametrize("row_bytes", [1 << 10, 1 << 18, 1 << 20, 1 << 21, 1 << 22, 1 << 26])
def test_states_are_asked_for_a_few_megabytes_ahead(row_bytes):
    rows = cuda.rows_ahead(row_bytes)
    assert rows >= 1 and (rows == 1 or 1 << 20 <= rows * row_bytes <= 4 << 20)


@pytest.mark.parametrize(("tile_v", "warps"), [(8, 4), (48, 4), (256, 8), (32, 3)])
def test_a_tile_that_gives_lanes_no_whole_rows_is_refused(tile_v, warps):
    with pytest.raises(ValueError, match=f"tile_v: found {tile_v} with {warps} warps"):
        Variant(tile_v=tile_v, warps=warps)


def test_calls_that_no_kernel_serves_are_refused():
    heads, tokens = 2, 3
    call = dict(
        mixed_qkv=torch.zeros(tokens, 4 * 128),
        a=torch.zeros(tokens, heads),
        b=torch.zeros(tokens, heads),
        A_log=torch.zeros(heads),
        dt_bias=torch.zeros(heads),
        pool=torch.zeros(2, heads, 128, 128),
        out=torch.zeros(tokens, heads, 128),
    )
    with pytest.raises(ValueError, match="max_tokens: found 9, allowed 1..8"):
        cuda.decode(**call, read=torch.zeros(1, dtype=torch.int32), max_tokens=9)
    with pytest.raises(ValueError, match="rows: found 65536, allowed up to 65535"):
        cuda.decode(**call, read=torch.zeros(65536, dtype=torch.int32))
