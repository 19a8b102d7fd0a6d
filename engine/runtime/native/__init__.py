"""Our own kernels for CPUs (AMX, AVX-512, AVX2): products with packed weights, decoder blocks, GPTQ's sums and columns."""
