"""Post-training quantization compiler for diffusion UNets."""
