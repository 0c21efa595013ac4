"""FlashInfer's stages in plain torch, on the layouts that its kernels read: where each byte lies is derived here, not taken over.

Sources: the docstrings and index computations of FlashInfer 0.7.0 and 0.7.2. Slow; for small layers on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_backend_plugin.moe.blackwell import Library

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
LINEAR, TILED, SWIGLU, RELU2 = 2, 0, 3, 6


def memory(tensor: Tensor) -> Tensor:
    """All bytes from the tensor's first on, in the order they lie: what a kernel gets is a pointer."""
    return torch.as_strided(tensor.view(torch.uint8), (tensor.numel(),), (1,))


def place(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Byte of the scale of (row, group of 16) in a matrix of ``width`` groups: 128 x 4 tiles of 512 bytes, 32 lanes of 16."""
    tile = (rows // 128) * (width // 4) + columns // 4
    return tile * 512 + (rows % 32) * 16 + (rows % 128 // 32) * 4 + columns % 4


def codes_of(packed: Tensor) -> Tensor:
    """Values [..., K] of uint8 [..., K/2]."""
    found = torch.empty(*packed.shape[:-1], packed.shape[-1] * 2)
    found[..., 0::2], found[..., 1::2] = VALUES[(packed & 15).long()], VALUES[(packed >> 4).long()]
    return found


def tiled_scales(scale: Tensor, index: int, rows: int, groups: int) -> Tensor:
    """float32 [rows, groups] of matrix number ``index`` in tiled memory."""
    r, g = torch.arange(rows).view(-1, 1), torch.arange(groups).view(1, -1)
    size = -(-rows // 128) * 128 * groups
    return memory(scale)[index * size + place(r, g, groups)].view(torch.float8_e4m3fn).float()


def rounded(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 codes [M, K/2], scale bytes [M, K/16]) with a number, or one a row, that x is multiplied by before its block scales."""
    scale = scale.view(-1, 1)
    blocks = x.float().unflatten(-1, (-1, 16))
    block_scale = (blocks.abs().amax(-1) * (1 / 6) * scale).clamp(max=448).to(torch.float8_e4m3fn)
    grow = torch.where(block_scale.float() == 0, 0.0, scale / block_scale.float())
    scaled = (blocks * grow.unsqueeze(-1)).clamp(-6, 6).flatten(-2)
    distance = (scaled.abs().unsqueeze(-1) - VALUES[:8]).abs()
    # To the nearest; of two as near the even code.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    code = order[distance[..., order].argmin(-1)] + 8 * (scaled < 0)
    return (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8), block_scale.view(torch.uint8)


@dataclass
class Emulation:
    """``calls``: (stage, arguments) in order. ``wrong``: a mistake to make, for tests of who would notice."""

    calls: list[tuple[str, tuple, dict[str, Any]]] = field(default_factory=list)
    wrong: str = ""

    def library(self) -> Library:
        def noted(name: str):
            function = getattr(self, name)

            def call(*args, **kwargs):
                self.calls.append((name, args, kwargs))
                return function(*args, **kwargs)

            return call

        stages = ("quantize", "quantize_by_token", "sort", "first", "second", "zero", "combine")
        return Library(*(noted(stage) for stage in stages), LINEAR, TILED, SWIGLU, RELU2)

    def quantize(self, x, global_scale, sf_vec_size, sf_use_ue8m0, is_sf_swizzled_layout):
        assert (sf_vec_size, sf_use_ue8m0, is_sf_swizzled_layout) == (16, False, False) and global_scale.shape == (1,)
        assert x.stride(-2) != 1, "it would be transposed"
        return rounded(x, global_scale)

    def quantize_by_token(self, x, global_scale_inv, sf_layout):
        largest = x.float().abs().amax(-1).nan_to_num(0)
        token = largest * global_scale_inv
        codes, scale = rounded(x.float().nan_to_num(0), torch.where(token == 0, 1.0, 1 / token))
        if sf_layout == TILED:
            rows, groups = scale.shape
            padded = -(-groups // 4) * 4
            tiled = torch.zeros(-(-rows // 128) * 128 * padded, dtype=torch.uint8)
            tiled[place(torch.arange(rows).view(-1, 1), torch.arange(groups).view(1, -1), padded)] = scale
            scale = tiled.view(-1, padded)
        return codes, scale, token

    def sort(
        self,
        token_selected_experts,
        token_final_scales,
        num_experts,
        top_k,
        local_expert_offset,
        num_local_experts,
        tile_tokens_dim,
        out_tile_idx_to_expert_idx,
        out_tile_idx_to_mn_limit,
        out_expanded_idx_to_permuted_idx,
        out_permuted_idx_to_expanded_idx,
        out_total_num_padded_tokens,
        out_num_non_exiting_tiles,
    ):
        assert token_selected_experts.dtype is torch.int32 and token_final_scales.dtype is torch.float32
        assert token_selected_experts.shape[1] == top_k and -32768 <= int(token_selected_experts.min())
        ids = (token_selected_experts - local_expert_offset).view(-1).tolist()
        # What lies beyond the active part stays as it was: garbage.
        out_permuted_idx_to_expanded_idx.fill_(-77)
        position, row, tile = out_expanded_idx_to_permuted_idx.view(-1).fill_(-1), 0, 0
        for expert in range(num_local_experts):
            pairs = [pair for pair, found in enumerate(ids) if found == expert]
            for start in range(0, len(pairs), tile_tokens_dim):
                part = pairs[start : start + tile_tokens_dim]
                out_tile_idx_to_expert_idx[tile], out_tile_idx_to_mn_limit[tile] = expert, row + len(part)
                for i, pair in enumerate(part):
                    position[pair], out_permuted_idx_to_expanded_idx[row + i] = row + i, pair
                row, tile = row + tile_tokens_dim, tile + 1
        out_total_num_padded_tokens[0], out_num_non_exiting_tiles[0] = row, tile

    def first(
        self,
        *,
        a,
        b,
        a_scale,
        b_scale,
        alpha,
        tile_idx_to_expert_idx,
        tile_idx_to_mn_limit,
        token_id_mapping,
        num_non_exiting_tiles,
        out,
        out_scale,
        global_scale,
        a_per_token_scale,
        topk,
        a_dtype,
        b_dtype,
        c_dtype,
        quantize_output,
        mma_tiler_mn,
        cluster_shape_mn,
        activation_type,
        swiglu_alpha,
        swiglu_beta,
        swiglu_limit,
        gated,
    ):
        tile, n = mma_tiler_mn[0], b.shape[1]
        assert cluster_shape_mn == (tile // 128, 1) and n % mma_tiler_mn[1] == 0 and a_dtype == b_dtype == "float4_e2m1fn"
        assert quantize_output is (c_dtype == "float4_e2m1fn") and gated is (activation_type == SWIGLU)
        assert out.shape[0] % tile == 0 == token_id_mapping.shape[0] - out.shape[0]
        inputs = codes_of(a) * memory(a_scale).view(a.shape[0], -1).view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
        groups = a.shape[1] * 2 // 16
        out.view(torch.uint8).fill_(0xFF)
        for index in range(int(num_non_exiting_tiles)):
            expert, start, limit = int(tile_idx_to_expert_idx[index]), index * tile, int(tile_idx_to_mn_limit[index])
            token = token_id_mapping[start:limit].long() // topk
            weight = codes_of(b[expert]) * tiled_scales(b_scale, expert, n, groups).repeat_interleave(16, 1)
            factor = alpha[expert] if a_per_token_scale is None else alpha[expert] * a_per_token_scale[token].view(-1, 1)
            sums = (inputs[token] @ weight.t()) * factor
            if gated:
                # 64 columns of up, 64 of gate.
                up, gate = sums.unflatten(1, (-1, 2, 64)).unbind(2)
                if self.wrong == "gate and up swapped":
                    up, gate = gate, up
                gate, up = gate.flatten(1).clamp(max=swiglu_limit), up.flatten(1).clamp(-swiglu_limit, swiglu_limit)
                h = gate * torch.sigmoid(swiglu_alpha * gate) * (up + swiglu_beta)
            else:
                h = sums.relu().square()
            if not quantize_output:
                out[start:limit] = h.to(out.dtype)
                continue
            codes, scale = rounded(h, global_scale)
            out[start:limit] = codes
            rows, columns = torch.arange(start, limit).view(-1, 1), torch.arange(scale.shape[1]).view(1, -1)
            memory(out_scale)[place(rows, columns, scale.shape[1])] = scale
        return out, out_scale

    def zero(self, out):
        assert out.is_contiguous()
        if self.wrong != "output not zeroed":
            out.zero_()

    def second(
        self,
        *,
        a,
        b,
        a_scale,
        b_scale,
        alpha,
        tile_idx_to_expert_idx,
        num_non_exiting_tiles,
        tile_idx_to_mn_limit,
        permuted_idx_to_expanded_idx,
        token_final_scales,
        out,
        a_per_token_scale,
        a_dtype,
        b_dtype,
        out_dtype,
        mma_tiler_mn,
        cluster_shape_mn,
        use_fused_finalize,
    ):
        tile, n, groups, top_k = mma_tiler_mn[0], b.shape[1], b.shape[2] * 2 // 16, token_final_scales.shape[1]
        assert cluster_shape_mn[0] == tile // 128 and a_dtype == b_dtype == "float4_e2m1fn" and out_dtype == "bfloat16"
        assert out.shape == (token_final_scales.shape[0] * (1 if use_fused_finalize else top_k), n)
        scales = tiled_scales(a_scale, 0, a.shape[0], groups)
        for index in range(int(num_non_exiting_tiles)):
            expert, start, limit = int(tile_idx_to_expert_idx[index]), index * tile, int(tile_idx_to_mn_limit[index])
            pair = permuted_idx_to_expanded_idx[start:limit].long()
            inputs = codes_of(a[start:limit]) * scales[start:limit].repeat_interleave(16, 1)
            weight = codes_of(b[expert]) * tiled_scales(b_scale, expert, n, groups).repeat_interleave(16, 1)
            factor = alpha[expert].view(1, 1)
            if use_fused_finalize:
                factor = factor * token_final_scales.view(-1)[pair].view(-1, 1)
            if a_per_token_scale is not None:
                factor = factor * a_per_token_scale[start:limit].view(-1, 1)
            rows = (inputs @ weight.t()) * factor
            if self.wrong == "last row left out":
                pair, rows = pair[:-1], rows[:-1]
            if use_fused_finalize:
                out.index_add_(0, pair // top_k, rows.to(out.dtype))
            else:
                out[pair] = rows.to(out.dtype)
        return out

    def combine(self, *, permuted_input, output, expanded_idx_to_permuted_idx, topk_scales, num_tokens, top_k, input_is_expanded):
        assert input_is_expanded and output.shape[0] == num_tokens
        rows = permuted_input.float().view(num_tokens, top_k, -1)
        there = (expanded_idx_to_permuted_idx >= 0).unsqueeze(-1)
        output.copy_(torch.where(there, rows * topk_scales.unsqueeze(-1), 0.0).sum(1))
