"""Gated-delta-net decode: slots (engine indices to split-pool indices), the reference, the operators."""
