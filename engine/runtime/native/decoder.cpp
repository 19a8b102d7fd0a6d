// A decoder block of the Llama family for one new token of each sequence, and the functions that Python calls.
// Roundings to bfloat16 stand where `transformers` has them, so that only the order of sums differs.
#include <algorithm>
#include <cmath>
#include <vector>

#include "products.h"

namespace {

// Mirrored by `_Block` in library.py.
struct Block {
    const bf16 *before_attention, *before_mlp;   // RMS norms (hidden)
    const bf16 *query_norm, *key_norm;           // RMS norms (size) or null
    float epsilon;
    int32_t hidden, inner, heads, shared, size;  // inner: of the feed-forward; shared: heads of keys and values
    Matrix q_k_v[3], o, gate_up[2], down;
};

// RMS norm: weight times x / sqrt(mean of squares + epsilon), the quotient rounded first.
void normalize(const bf16* x, const bf16* weight, int n, float epsilon, bf16* out) {
    Floats squares = zeros();
    for (int k = 0; k < n; k += 16) {
        const Floats v = load(x + k, lanes(n - k));
        squares = fused(v, v, squares);
    }
    const Floats factor = all(1 / std::sqrt(sum(squares) / float(n) + epsilon));
    for (int k = 0; k < n; k += 16) {
        const Lanes mask = lanes(n - k);
        store(out + k, rounded(load(x + k, mask) * factor) * load(weight + k, mask), mask);
    }
}

// Rotate the pairs (i, i + size / 2) of a head by the angles of its position; cos and sin: float32 (size / 2).
void rotate(bf16* head, const float* cos, const float* sin, int size) {
    const int half = size / 2;
    for (int k = 0; k < half; k += 16) {
        const Lanes mask = lanes(half - k);
        const Floats a = load(head + k, mask), b = load(head + half + k, mask);
        const Floats c = load(cos + k, mask), s = load(sin + k, mask);
        store(head + k, fused_less(a, c, b * s), mask);
        store(head + half + k, fused(b, c, a * s), mask);
    }
}

void add(bf16* x, const bf16* y, long n) {
    for (long k = 0; k < n; k += 16) {
        const Lanes mask = lanes(n - k);
        store(x + k, load(x + k, mask) + load(y + k, mask), mask);
    }
}

// gate[i] = silu(gate[i]) up[i]
void gated(bf16* gate, const bf16* up, int n) {
    for (int k = 0; k < n; k += 16) {
        const Lanes mask = lanes(n - k);
        const Floats g = load(gate + k, mask);
        store(gate + k, rounded(g / (all(1) + exponential(zeros() - g))) * load(up + k, mask), mask);
    }
}

}  // namespace

extern "C" {

void maquette_multiply(const Matrix* matrix, const bf16* x, int m, bf16* out, int threads) {
    multiply(matrix, 1, x, m, out, threads);
}

void maquette_multiply_many(const Matrix* matrix, const bf16* x, long m, bf16* out, int threads) {
    multiply_many(*matrix, x, m, out, threads);
}

void maquette_normalize(const bf16* x, const bf16* weight, int m, int n, float epsilon, bf16* out) {
    for (int i = 0; i < m; ++i) normalize(x + long(i) * n, weight, n, epsilon, out + long(i) * n);
}

// q_k_v (B, heads + 2 shared, size): queries and keys rotated, and values, of the tokens x (B, hidden).
void maquette_project(const Block* block, const bf16* x, int batch, const float* cos, const float* sin, bf16* q_k_v,
                      int threads) {
    const int rotated = block->heads + block->shared, size = block->size;
    std::vector<bf16> normed(size_t(batch) * block->hidden);
    maquette_normalize(x, block->before_attention, batch, block->hidden, block->epsilon, normed.data());
    multiply(block->q_k_v, 3, normed.data(), batch, q_k_v, threads);
    for (int i = 0; i < batch; ++i)
        for (int h = 0; h < rotated; ++h) {
            bf16* head = q_k_v + (long(i) * (rotated + block->shared) + h) * size;
            const bf16* norm = h < block->heads ? block->query_norm : block->key_norm;
            if (norm) normalize(head, norm, size, block->epsilon, head);
            rotate(head, cos, sin, size);
        }
}

// The rest of the block: x (B, hidden) becomes the block's output, from the attention's (B, heads size).
void maquette_finish(const Block* block, const bf16* attended, bf16* x, int batch, int threads) {
    const int hidden = block->hidden, inner = block->inner;
    std::vector<bf16> y(size_t(batch) * hidden), wide(size_t(batch) * 2 * inner), gates(size_t(batch) * inner);
    multiply(&block->o, 1, attended, batch, y.data(), threads);
    add(x, y.data(), long(batch) * hidden);
    maquette_normalize(x, block->before_mlp, batch, hidden, block->epsilon, y.data());
    multiply(block->gate_up, 2, y.data(), batch, wide.data(), threads);
    for (int i = 0; i < batch; ++i) {
        bf16* row = wide.data() + long(i) * 2 * inner;
        gated(row, row + inner, inner);
        std::copy(row, row + inner, gates.data() + long(i) * inner);
    }
    multiply(&block->down, 1, gates.data(), batch, y.data(), threads);
    add(x, y.data(), long(batch) * hidden);
}
}
