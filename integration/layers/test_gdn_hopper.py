"""What surrounds the GPU kernels of gated-delta-net layers in vLLM and needs no GPU: the tables of slots, and compiled graphs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from moe_backend_plugin.device import Choice
from moe_backend_plugin.engines.vllm.arguments import extra_config

DRAFTS = 2
HEADS, KEY_HEADS, SIZE = 4, 2, 128
_number = itertools.count()


@pytest.fixture(scope="module")
def drafts(vllm_config, next_model):
    """vLLM's configuration of a real model with drafts."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3}
    found = EngineArgs(
        model=str(next_model), quantization="nvfp4_cutedsl", max_model_len=256, max_num_seqs=8, speculative_config=speculative
    ).create_engine_config()
    with set_current_vllm_config(found):
        yield found


@pytest.fixture
def gdn_cuda(vllm_config):
    pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
    from moe_backend_plugin.engines.vllm import gdn_cuda

    return gdn_cuda


class Read(list):
    """Tables of slots; ``norms``: the weight of the norm that each call had in it, or None."""

    def __init__(self) -> None:
        self.norms: list = []


@pytest.fixture
def read(gdn_cuda, monkeypatch):
    """The tables of slots that the kernel was given; as the kernel does, this refuses other strides than it was compiled for."""
    found = Read()

    def decode(x, a, b, A_log, dt_bias, pool, slots, out, **more):
        found.norms.append(more.get("norm_weight"))
        for table in (slots, more.get("write"), more.get("cu_seqlens"), more.get("num_accepted")):
            assert table is None or table.stride(-1) == 1, f"Mismatched strides {table.stride()}"
        found.append(slots)

    monkeypatch.setattr(gdn_cuda.cuda, "decode", decode)
    monkeypatch.setattr(gdn_cuda, "_convolve", lambda layer, x, **rows: x)
    return found


def metadata(config, mode: str, lengths: list[int], computed: list[int], full: bool = False):
    """What vLLM's own builder makes of requests with so many new and earlier tokens, none with drafts; and the block table."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import MambaSpec

    spec = MambaSpec(
        block_size=16, shapes=((1,),), dtypes=(torch.float32,), mamba_cache_mode=mode, num_speculative_blocks=config.num_speculative_tokens
    )
    config.cache_config.mamba_cache_mode = mode
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL if full else CUDAGraphMode.NONE
    builder = GDNAttentionMetadataBuilder(spec, ["model.layers.0.linear_attn"], config, torch.device("cpu"))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    ends = torch.tensor(lengths, dtype=torch.int32) + torch.tensor(computed, dtype=torch.int32)
    columns = 1 + DRAFTS if mode == "none" else 16
    table = torch.randperm(len(lengths) * columns).int().view(-1, columns) + 1
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ends,
        seq_lens_cpu_upper_bound=ends,
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=int(ends.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
        is_prefilling=torch.ones(len(lengths), dtype=torch.bool),
    )
    none = torch.full((len(lengths),), -1, dtype=torch.int32)
    made = builder.build(0, common, num_accepted_tokens=torch.ones_like(none), num_decode_draft_tokens_cpu=none)
    first = (ends.long() - 1) // 16 if mode == "align" else torch.zeros(len(lengths), dtype=torch.int64)
    return made, table.gather(1, first.view(-1, 1)).view(-1)


@pytest.mark.parametrize("mode", ["none", "align"])
def test_a_column_of_the_block_table_is_copied_for_the_kernel(drafts, gdn_cuda, read, monkeypatch, mode):
    """Drafts are configured and no row has one: the ends of prompts, one token each."""
    made, slots = metadata(drafts, mode, [1, 1, 1], [20, 7, 100])
    assert made.num_decodes == 3 and made.non_spec_state_indices_tensor.stride(0) == 1 + DRAFTS, "vLLM gives a column"
    monkeypatch.setattr(gdn_cuda, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"gdn": made}))
    layer = SimpleNamespace(prefix="gdn", A_log=None, dt_bias=None, kv_cache=(None, None))
    assert gdn_cuda.step(layer, *(torch.zeros(3, 1) for _ in range(4)))
    assert len(read) == 1 and torch.equal(read[0], slots)


@pytest.mark.parametrize("mode", ["none", "align"])
def test_so_it_is_in_a_batch_with_prefills(drafts, gdn_cuda, read, mode):
    made, slots = metadata(drafts, mode, [1, 1, 5], [20, 7, 0])
    assert (made.num_decodes, made.num_prefills) == (2, 1) and made.non_spec_state_indices_tensor.stride(0) == 1 + DRAFTS
    parts = {name: torch.zeros(1, 2, heads, SIZE) for name, heads in (("q", KEY_HEADS), ("k", KEY_HEADS), ("v", HEADS))}
    gdn_cuda._update(
        A_log=None,
        a=torch.zeros(2, HEADS),
        b=torch.zeros(2, HEADS),
        dt_bias=None,
        **parts,
        initial_state=None,
        inplace_final_state=True,
        cu_seqlens=made.non_spec_query_start_loc[: made.num_decodes + 1],
        ssm_state_indices=made.non_spec_state_indices_tensor,
        use_qk_l2norm_in_kernel=True,
    )
    assert len(read) == 1 and torch.equal(read[0], slots[:2])


def test_under_a_full_graph_the_slots_are_vllms_own_buffer(drafts, gdn_cuda, read, monkeypatch):
    """What a graph replays must be read where vLLM writes it, and nothing may be allocated."""
    made, slots = metadata(drafts, "none", [1, 1, 1], [20, 7, 100], full=True)
    monkeypatch.setattr(gdn_cuda, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"gdn": made}))
    layer = SimpleNamespace(prefix="gdn", A_log=None, dt_bias=None, kv_cache=(None, None))
    assert gdn_cuda.step(layer, *(torch.zeros(3, 1) for _ in range(4)))
    assert read[0].data_ptr() == made.non_spec_state_indices_tensor.data_ptr() and torch.equal(read[0], slots)


# --- the gated norm ---------------------------------------------------------------------------------------------------------------------


class Layer(SimpleNamespace):
    """A layer that notes the norms that follow its decode kernel: (output, gate)."""

    def __init__(self) -> None:
        norm = SimpleNamespace(weight=torch.ones(SIZE), eps=1e-6, activation="silu")
        super().__init__(prefix="gdn", A_log=None, dt_bias=None, kv_cache=(None, None), norm=norm, normed=[])

    def _rms_norm_gated_cuda(self, x, gate, out):
        assert x.data_ptr() == out.data_ptr() and x.shape == gate.shape == out.shape
        self.normed.append((out, gate))


@pytest.mark.parametrize(("heads", "inside"), [(21, True), (22, False)])
def test_few_rows_have_the_norm_in_the_kernel_and_many_behind_it(drafts, gdn_cuda, read, monkeypatch, heads, inside):
    """3 rows: 63 or 66 rows x heads. A graph may be padded: only the batch's tokens are normalised."""
    made, _ = metadata(drafts, "none", [1, 1, 1], [20, 7, 100], full=True)
    monkeypatch.setattr(gdn_cuda, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"gdn": made}))
    layer, tokens = Layer(), made.num_actual_tokens
    x, gates, (out, gate) = torch.zeros(5, 1), torch.zeros(5, heads), (torch.zeros(5, heads, SIZE) for _ in range(2))
    assert gdn_cuda.step(layer, x, gates, gates, out, gate)
    assert read.norms == [layer.norm.weight if inside else None]
    assert [(o.shape[0], g.shape[0]) for o, g in layer.normed] == ([] if inside else [(tokens, tokens)])


def test_drafts_have_the_norm_behind_them(gdn_cuda, read, monkeypatch):
    made = SimpleNamespace(
        num_prefills=0, num_decodes=0, num_actual_tokens=3, num_spec_decodes=1, spec_sequence_masks=torch.ones(1, dtype=torch.bool),
        spec_state_indices_tensor=torch.ones(1, 3, dtype=torch.int32), spec_query_start_loc=torch.tensor([0, 3], dtype=torch.int32),
        num_accepted_tokens=torch.ones(1, dtype=torch.int32),
    )  # fmt: skip
    monkeypatch.setattr(gdn_cuda, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"gdn": made}))
    layer, gates = Layer(), torch.zeros(3, 1)
    assert gdn_cuda.step(layer, torch.zeros(3, 1), gates, gates, *(torch.zeros(3, 1, SIZE) for _ in range(2)))
    assert read.norms == [None] and len(layer.normed) == 1


def test_without_a_gate_nothing_is_normalised(drafts, gdn_cuda, read, monkeypatch):
    made, _ = metadata(drafts, "none", [1, 1, 1], [20, 7, 100])
    monkeypatch.setattr(gdn_cuda, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"gdn": made}))
    layer, gates = Layer(), torch.zeros(3, 1)
    assert gdn_cuda.step(layer, torch.zeros(3, 1), gates, gates, torch.zeros(3, 1, SIZE)) and read.norms == [None] and not layer.normed


# --- compiled graphs --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def layer(drafts, monkeypatch):
    """vLLM's layer, made as a model makes it, by the provider that is asked for."""
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn

    from moe_backend_plugin.engines.vllm import gdn

    def make(provider: str, interleaved: bool = False):
        monkeypatch.setattr(drafts, "additional_config", {})
        monkeypatch.setattr(gdn, "provider", lambda kind, where: Choice(provider, "a test"))
        prefix = f"model.layers.{next(_number)}.linear_attn"
        made = qwen_gdn_linear_attn.QwenGatedDeltaNetAttention(
            drafts.model_config.hf_config, vllm_config=drafts, prefix=prefix, gqa_interleaved_layout=interleaved
        )
        assert isinstance(made, gdn.PluginGatedDeltaNetAttention)
        return made

    return make


@pytest.fixture
def prepared(drafts, gdn_cuda, monkeypatch):
    """The kinds of kernels that layers asked for, where a GPU would compile them; of an engine that runs models as they are."""
    from vllm.config import CompilationMode

    found = []
    monkeypatch.setattr(gdn_cuda.cuda, "prepare", lambda kinds, *_, **__: found.append(kinds) or 0)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(drafts.compilation_config, "mode", CompilationMode.NONE)
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_a_graph_around_vllms_fused_kernel_is_not_loaded(drafts, gdn_cuda, layer, prepared, monkeypatch, fused, folded):
    """vLLM's graph of a Qwen3.5 with drafts has another operator in it than this package's; without drafts both are the same. The norm is
    folded in where nothing is compiled."""
    from vllm.config import CompilationMode

    made = layer("engine")
    made.enable_fused_gdn_spec_decode = fused  # as the constructor decides on a GPU
    if not folded:  # a compiler fuses the norm with what is around it
        monkeypatch.setattr(drafts.compilation_config, "mode", CompilationMode.VLLM_COMPILE)
    before = drafts.compute_hash()
    assert gdn_cuda.prepare(made, drafts) == folded
    assert not made.enable_fused_gdn_spec_decode
    assert (drafts.compute_hash() != before) == fused
    assert extra_config(drafts) is None, "no settings, and no misspelling of them"
    assert prepared[0].norm == ("silu" if folded else "")


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_operator_gets_what_the_projections_made(drafts, gdn_cuda, layer, prepared, monkeypatch, interleaved):
    """q, k and v side by side, z as the gate, b and a apart: what vLLM's own code makes of either layout."""
    monkeypatch.setattr(gdn_cuda, "unsupported_reason", lambda *_: None)
    made = layer("cutedsl", interleaved)
    assert made._forward_method == made.forward_gated
    config, tokens = drafts.model_config.hf_config, 3
    heads, key_heads = config.linear_num_value_heads, config.linear_num_key_heads
    width = 2 * key_heads * made.head_k_dim + 2 * heads * made.head_v_dim
    qkvz, ba = torch.randn(tokens, width), torch.randn(tokens, 2 * heads)
    for name, value in (("in_proj_qkvz", qkvz), ("in_proj_ba", ba)):
        monkeypatch.setattr(getattr(made, name), "forward", lambda _, value=value: (value, None))
    monkeypatch.setattr(made.out_proj, "forward", lambda x: (x, None))
    found = []
    context = SimpleNamespace(no_compile_layers={made.prefix: made}, attn_metadata={})
    monkeypatch.setattr(gdn_cuda, "get_forward_context", lambda: context)
    monkeypatch.setattr(gdn_cuda, "step", lambda layer, *parts: found.append(parts) or parts[3].copy_(parts[4]) is not None)
    given = made.forward_gated(torch.zeros(tokens, config.hidden_size))
    ((qkv, b, a, out, z),) = found
    if interleaved:
        *wanted, wanted_z, wanted_b, wanted_a = made.fix_query_key_value_ordering(qkvz, ba)
        wanted_qkv = torch.cat([part.flatten(1) for part in wanted], dim=-1)
    else:
        wanted_qkv, wanted_z = qkvz.split([width - heads * made.head_v_dim, heads * made.head_v_dim], dim=-1)
        wanted_b, wanted_a = ba.chunk(2, dim=-1)
    assert torch.equal(qkv, wanted_qkv) and torch.equal(z.flatten(1), wanted_z.flatten(1))
    assert torch.equal(b, wanted_b) and torch.equal(a, wanted_a)
    assert torch.equal(given, z.flatten(1)), "the output is what the operator left"


def test_a_batch_with_prefills_is_vllms_with_its_norm_behind_it(drafts, gdn_cuda, layer, prepared, monkeypatch):
    from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention

    monkeypatch.setattr(gdn_cuda, "unsupported_reason", lambda *_: None)
    made, calls = layer("cutedsl"), []
    context = SimpleNamespace(attn_metadata={made.prefix: SimpleNamespace(num_prefills=1, num_actual_tokens=3)})
    monkeypatch.setattr(gdn_cuda, "get_forward_context", lambda: context)
    monkeypatch.setattr(QwenGatedDeltaNetAttention, "_forward_core", lambda *parts: calls.append("core"))
    monkeypatch.setattr(QwenGatedDeltaNetAttention, "_rms_norm_gated_cuda", lambda _, x, *parts: calls.append(("norm", x.shape[0])))
    x, gates, (z, out) = torch.zeros(4, 1), torch.zeros(4, 1), (torch.zeros(4, 1, SIZE) for _ in range(2))
    made.core_gated(x, gates, gates, z, out)
    assert calls == ["core", ("norm", 3)]
    context.attn_metadata = None  # vLLM measures its memory
    made.core_gated(x, gates, gates, z, out)
    assert calls[2:] == ["core"]


def test_a_graph_around_vllms_cpu_layer_is_not_loaded(drafts, layer):
    layer("engine")
    before = drafts.compute_hash()
    layer("torch")
    assert drafts.compute_hash() != before
