"""Gated-delta-net decode and verification of drafts in SGLang on this package's kernels; prefill stays SGLang's.

Convolution, prefix-cache tracking (which copies slots after each step), and the commit of accepted drafts from the intermediate states
are SGLang's as well.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
from sglang.srt.layers.attention.linear.kernels.kernel_backend import LinearAttnKernelBase
from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.runtime_context import get_exec, get_parallel

from ...device import choose_provider
from ...errors import UnsupportedLayerError
from ...gdn.op import gdn_decode
from ...gdn.slots import PoolLayout, from_sglang
from . import GDN_BACKEND, slots
from .arguments import GDN_FLAG as FLAG
from .hooks import wrap
from .settings import device, plugin_config

logger = logging.getLogger("sglang.moe_backend_plugin")


class PluginGDNKernel(LinearAttnKernelBase):
    """SGLang's interface of a kernel. On a CPU it calls this package's torch op, which tests use."""

    supports_packed_decode = True
    supports_strided_target_verify_qkv = True

    def __init__(self, engine: TritonGDNKernel) -> None:
        self._engine = engine

    def packed_decode(
        self,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        scale: float,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        num_v_heads: int,
        head_v_dim: int,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[rows, 2 HQ K + HV V], one token a row -> [1, rows, HV, V]; ``ssm_states`` [slots, HV, V, K] updated in place."""
        out = mixed_qkv.new_empty(mixed_qkv.shape[0], num_v_heads, head_v_dim)
        _decode(mixed_qkv, a, b, A_log, dt_bias, ssm_states, slots.table(cache_indices[: mixed_qkv.shape[0]]), out)
        return out[None]

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.packed_decode(
            slots.packed(q, k, v),
            a,
            b,
            A_log=A_log,
            dt_bias=dt_bias,
            scale=k.shape[-1] ** -0.5,
            ssm_states=ssm_states,
            cache_indices=cache_indices,
            num_v_heads=v.shape[2],
            head_v_dim=v.shape[3],
        )

    def extend(self, *args: Any, **kwargs: Any) -> tuple:
        return self._engine.extend(*args, **kwargs)

    def target_verify(
        self,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        intermediate_states_buffer: torch.Tensor | None = None,
        intermediate_state_indices: torch.Tensor | None = None,
        cache_steps: int = 1,
        retrieve_parent_token: torch.Tensor | None = None,
        stable_rows: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q, k [1, tokens, HQ, K], v [1, tokens, HV, V] -> [1, tokens, HV, V]; the pool stays as it is.

        ``intermediate_states_buffer`` [rows or more, steps, HV, V, K] gets the state after each token. SGLang's row of a batch is the
        buffer's row (``intermediate_state_indices`` counts up from 0), but for the case that :func:`.slots.engine_reason` names.
        """
        tree = retrieve_parent_token is not None
        reason = slots.engine_reason(_max_tokens(ssm_states), cache_steps, stable_rows, intermediate_states_buffer, tree)
        if reason is not None:
            return self._engine.target_verify(
                A_log=A_log,
                dt_bias=dt_bias,
                q=q,
                k=k,
                v=v,
                a=a,
                b=b,
                ssm_states=ssm_states,
                cache_indices=cache_indices,
                query_start_loc=query_start_loc,
                intermediate_states_buffer=intermediate_states_buffer,
                intermediate_state_indices=intermediate_state_indices,
                cache_steps=cache_steps,
                retrieve_parent_token=retrieve_parent_token,
                stable_rows=stable_rows,
                **kwargs,
            )
        read, starts = slots.rows_of_verify(query_start_loc, cache_indices)
        out = torch.zeros_like(v[0], memory_format=torch.contiguous_format)
        _decode(slots.packed(q, k, v), a, b, A_log, dt_bias, ssm_states, read, out, starts, intermediate_states_buffer, cache_steps)
        return out[None]


def _max_tokens(pool: torch.Tensor) -> int:
    """Tokens of a row; the torch op has no limit, and a CPU may lack the kernels' compiler."""
    if pool.device.type == "cpu":
        return sys.maxsize
    from ...gdn.cuda import MAX_TOKENS

    return MAX_TOKENS


def _decode(
    qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    pool: torch.Tensor,
    read: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor | None = None,
    intermediate: torch.Tensor | None = None,
    steps: int = 1,
) -> None:
    """One launch, no allocation; with ``starts`` the pool is only read and the states go to ``intermediate``."""
    a, b = (part.view(qkv.shape[0], -1) for part in (a, b))
    if pool.device.type == "cpu":
        table = from_sglang(read, PoolLayout.of(pool), query_start_loc=starts)
        gdn_decode(qkv, a, b, A_log, dt_bias, pool, table, intermediate=intermediate, update_state=starts is None, out=out)
        return
    from ...gdn import cuda

    cuda.decode(
        *(qkv, a, b, A_log, dt_bias, pool, read, out),
        cu_seqlens=starts,
        max_tokens=steps,
        intermediate=intermediate,
        update_state=starts is None,
        live_begin=slots.LIVE_BEGIN,
    )


# --- changes of SGLang, see hooks.py ----------------------------------------------------------------------------------------------------


def take_dispatcher(module: Any) -> None:
    wrap(module, "GDNKernelDispatcher.__init__", _dispatcher_init)


def take_backend(module: Any) -> None:
    wrap(module, "GDNAttnBackend.__init__", _backend_init)


def _named() -> tuple[str, str]:
    """What the arguments name for decode and for prefill: SGLang's enumeration says CUSTOM for every name it does not know."""
    mamba = get_exec().mamba
    base = mamba.linear_attn_backend
    return mamba.linear_attn_decode_backend or base, mamba.linear_attn_prefill_backend or base


def _dispatcher_init(wrapped: Callable, instance: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Around ``GDNKernelDispatcher.__init__(decode_backend, prefill_backend, verify_backend)``."""
    decode_name, prefill_name = _named()
    if decode_name != GDN_BACKEND:
        wrapped(*args, **kwargs)
        return
    given = dict(zip(("decode_backend", "prefill_backend", "verify_backend"), args, strict=False)) | kwargs
    triton = LinearAttnKernelBackend.TRITON
    given["decode_backend"] = triton
    if prefill_name == GDN_BACKEND:
        given["prefill_backend"] = triton
    wrapped(**given)
    kernel = PluginGDNKernel(instance.tree_verify_kernel)
    instance.decode_kernel = kernel
    instance.supports_packed_decode = True
    # SGLang says triton both for its default and where the flag says so.
    if get_exec().mamba.linear_attn_verify_backend is None and not instance.verify_kernel_is_flashinfer:
        instance.verify_kernel = kernel
    verify = "this package's" if instance.verify_kernel is kernel else "SGLang's"
    logger.info("Gated-delta-net decode is served by: %s (verification of drafts: %s kernel)", GDN_BACKEND, verify)


def _backend_init(wrapped: Callable, instance: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Around ``GDNAttnBackend.__init__(model_runner)``: compile what the model needs, or say why it cannot be served."""
    wrapped(*args, **kwargs)
    if isinstance(instance.kernel_dispatcher.decode_kernel, PluginGDNKernel):
        verify = isinstance(instance.kernel_dispatcher.verify_kernel, PluginGDNKernel)
        prepare(args[0] if args else kwargs["model_runner"], verify)


def prepare(model_runner: Any, verify: bool) -> None:
    """Compile or load every kernel of this model, before the first request.

    Heads and sizes are the layers' own, those of this rank: configurations of models do not agree on names for them.

    Raises:
        UnsupportedLayerError: the device or the model's layers are not served, or no layer would ever ask.
    """
    choice = choose_provider("gdn", device(), plugin_config(), where=FLAG)
    if choice.provider == "engine":
        raise UnsupportedLayerError(FLAG, f"{device().name} ({device().arch})", "a GPU of compute capability 9.0, or another backend")
    if choice.provider == "torch":
        return
    layers = [module for module in model_runner.model.modules() if isinstance(module, RadixLinearAttention)]
    if not layers:
        # A draft model gets this backend with its target's configuration; a stage of a pipeline may have other layers only.
        if model_runner.is_draft_worker or get_parallel().pp_size > 1:
            return
        found = f"{type(model_runner.model).__name__}, whose layers do not call SGLang's gated-delta-net kernels"
        raise UnsupportedLayerError(FLAG, found, "another linear attention backend")

    from ...gdn import cuda
    from ...kernels import compile as kernels

    cache = model_runner.req_to_token_pool.mamba_pool.mamba_cache
    state, tokens = cache.temporal.dtype, model_runner.dtype
    for layer in layers:
        sizes = dict(head_k=layer.head_k_dim, head_v=layer.head_v_dim, key_heads=layer.num_k_heads, value_heads=layer.num_v_heads)
        if (reason := cuda.unsupported_reason(**sizes, state=state, tokens=tokens)) is not None:
            raise UnsupportedLayerError(FLAG, reason, "another linear attention backend")
    kernels.use_cache_folder(plugin_config().kernel_cache)
    where = torch.device("cuda", torch.cuda.current_device())
    drafts = verify and getattr(cache, "intermediate_ssm", None) is not None
    for bias, ratio in {(m.dt_bias.dtype, m.num_v_heads // m.num_k_heads) for m in layers if m.dt_bias is not None}:
        kernel = cuda.Layer(state=state, tokens=tokens, bias=bias, heads_per_group=ratio)
        if compiled := cuda.prepare(kernel, where, speculative=False, verify=drafts):
            logger.info("Compiled %d gated-delta-net kernels; they are kept in %s", compiled, kernels.cache_folder())
