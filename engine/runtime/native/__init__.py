"""Our own kernels for CPUs with AVX-512 and bfloat16 dot products: products with packed weights, and decoder blocks."""
