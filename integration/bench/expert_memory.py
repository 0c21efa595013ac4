"""Runs inside vLLM's worker, which imports it by name: that is why it is a module of its own."""

from __future__ import annotations


def expert_memory(model) -> dict:
    """Bytes of every parameter and buffer that the MoE layers' routed experts hold, and the weights these stand for."""
    import torch
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    held, weights = 0, 0
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            loose = (value for value in vars(layer).values() if isinstance(value, torch.Tensor))
            tensors = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers(), *loose)}
            held += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            weights += layer.w13_weight.numel() * (2 if layer.w13_weight.dtype is torch.uint8 else 1)
            weights += layer.w2_weight.numel() * (2 if layer.w2_weight.dtype is torch.uint8 else 1)
    return {"expert_bytes": held, "expert_weights": weights}
