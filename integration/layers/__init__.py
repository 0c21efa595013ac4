"""vLLM's own MoE layer, built in this process on the CPU, with this package's quantization method inside."""
