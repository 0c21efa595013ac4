"""NVFP4 mixture-of-experts and gated-delta-net decode kernels for vLLM and SGLang."""

__version__ = "0.1.0"
