"""Our own kernels for CPUs (AMX, AVX-512, AVX2): packed products, decoder blocks, GPTQ's sums and columns."""
