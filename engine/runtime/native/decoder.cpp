// A decoder block for one new token of each sequence, and the functions that Python calls. Families differ in what its
// struct says: norms of four kinds wherever one may stand, an order of heads, how much of a head turns, an MLP with
// gates or without, in turn with attention or beside it. Roundings to bfloat16 stand where `transformers` has them, so
// that only the order of sums differs.
#include <algorithm>
#include <cmath>
#include <vector>

#include "heads.h"
#include "products.h"

namespace {

// Mirrored by `Norm` in library.py.
struct Norm {
    enum Kind : int32_t {
        NONE,
        ROUNDED,  // weight times x / sqrt(mean of squares + epsilon), the quotient rounded first
        RMS,      // the same, rounded at the end alone
        LAYER,    // weight times (x - mean) / sqrt(variance + epsilon), plus bias
    };
    int32_t kind;
    float epsilon, base;        // base: what is added to the weights
    const bf16 *weight, *bias;  // null: ones, zeros
};

// Mirrored by `Block` in library.py.
struct Block {
    Heads heads;
    Norm before_attention, queries, keys;     // queries, keys: of each head, or with `whole` of all of them together
    Norm behind_attention, behind_sum;        // of what attention gave; of x with it
    Norm before_mlp, behind_mlp, behind_all;  // behind_all: of x with what the MLP gave
    int32_t hidden, inner;                    // inner: of the feed-forward
    int32_t asking, asked, rising;            // matrices of q_k_v, and heads that they give; matrices of up
    int32_t whole, gated, act, beside;        // beside: the MLP reads x as it was before attention
    const int32_t* order;                     // (heads + 2 shared) among those asked; null: they stand so
    Matrix q_k_v[3], o, up[2], down;          // up: the gate first, where there is one
};

enum Act : int32_t { SILU, GELU_TANH, GELU, RELU };  // as `ACTS` in forms.py has them

inline Floats sigmoid(Floats x) { return all(1) / (all(1) + exponential(zeros() - x)); }

template <int ACT> inline Floats acted(Floats x) {
    if constexpr (ACT == SILU) return x / (all(1) + exponential(zeros() - x));
    if constexpr (ACT == RELU) return larger(zeros(), x);  // what is no number stays none
    if constexpr (ACT == GELU_TANH)  // 0.5 x (1 + tanh y), y = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 y)
        return x * sigmoid(all(1.5957691216f) * x * fused(x * x, all(0.044715f), all(1)));
    // x times the normal distribution, from erf by Abramowitz and Stegun 7.1.26, which is off by 1.5e-7 at most.
    const Floats size = absolute(x), t = all(1) / fused(size, all(0.3275911f * 0.70710678f), all(1));
    Floats rest = all(1.061405429f);
    for (const float f : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) rest = fused(rest, t, all(f));
    rest = all(0.5f) * rest * t * exponential(all(-0.5f) * x * x);
    return less_fused(larger(x, zeros()), size, rest);
}

// out (rows, n) = act(x), or act(x) y; x and y are `apart` from row to row, and may be rows of `out`.
template <int ACT> void activate(const bf16* x, const bf16* y, long apart, int rows, int n, bf16* out) {
    for (int i = 0; i < rows; ++i, x += apart, out += n)
        for (int k = 0; k < n; k += 16) {
            const Lanes mask = lanes(n - k);
            const Floats found = acted<ACT>(load(x + k, mask));
            store(out + k, y ? rounded(found) * load(y + i * apart + k, mask) : found, mask);
        }
}
using Activate = void (*)(const bf16*, const bf16*, long, int, int, bf16*);
constexpr Activate ACTIVATES[] = {activate<SILU>, activate<GELU_TANH>, activate<GELU>, activate<RELU>};

// One row of n numbers; out may be x.
void normalize(const Norm& norm, const bf16* x, int n, bf16* out) {
    if (norm.kind == Norm::NONE) {
        if (x != out) std::copy(x, x + n, out);
        return;
    }
    Floats mean = zeros(), squares = zeros();
    if (norm.kind == Norm::LAYER) {
        for (int k = 0; k < n; k += 16) mean = mean + load(x + k, lanes(n - k));
        mean = all(sum(mean) / float(n));
    }
    for (int k = 0; k < n; k += 16) {
        const Lanes mask = lanes(n - k);
        const Floats v = only(mask, load(x + k, mask) - mean);
        squares = fused(v, v, squares);
    }
    const Floats factor = all(1 / std::sqrt(sum(squares) / float(n) + norm.epsilon)), base = all(norm.base);
    for (int k = 0; k < n; k += 16) {
        const Lanes mask = lanes(n - k);
        Floats v = (load(x + k, mask) - mean) * factor;
        if (norm.kind == Norm::ROUNDED) v = rounded(v);
        if (norm.weight) v = v * (load(norm.weight + k, mask) + base);
        if (norm.bias) v = v + load(norm.bias + k, mask);
        store(out + k, v, mask);
    }
}

void normalize(const Norm& norm, const bf16* x, int rows, int n, bf16* out) {
    for (int i = 0; i < rows; ++i) normalize(norm, x + long(i) * n, n, out + long(i) * n);
}

// Rotate the pairs (i, i + turning / 2) of a head by the angles of its position; cos and sin: float32 (turning / 2).
void rotate(bf16* head, const float* cos, const float* sin, int turning) {
    const int half = turning / 2;
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

// out (B, hidden) = down(act(up x)), or down(act(gate x) up x), of x (B, hidden); out may be x.
void feed_forward(const Block& block, const bf16* x, int batch, bf16* out, int threads) {
    const int inner = block.inner;
    const long apart = long(inner) * (block.gated ? 2 : 1);
    std::vector<bf16> wide(size_t(batch) * apart);
    multiply(block.up, block.rising, x, batch, wide.data(), threads);
    // Each row ends where it begins or before, and is read before the next one is written.
    ACTIVATES[block.act](wide.data(), block.gated ? wide.data() + inner : nullptr, apart, batch, inner, wide.data());
    multiply(&block.down, 1, wide.data(), batch, out, threads);
}

}  // namespace

extern "C" {

void maquette_multiply(const Matrix* matrix, const bf16* x, int m, bf16* out, int threads) {
    multiply(matrix, 1, x, m, out, threads);
}

void maquette_multiply_many(const Matrix* matrix, const bf16* x, long m, bf16* out, int threads) {
    multiply_many(*matrix, x, m, out, threads);
}

void maquette_normalize(const Norm* norm, const bf16* x, int m, int n, bf16* out) { normalize(*norm, x, m, n, out); }

void maquette_activate(int act, const bf16* x, int n, bf16* out) { ACTIVATES[act](x, nullptr, n, 1, n, out); }

// q_k_v (B, heads + 2 shared, size): queries and keys rotated, and values, of the tokens x (B, hidden).
void maquette_project(const Block* block, const bf16* x, int batch, const float* cos, const float* sin, bf16* q_k_v,
                      int threads) {
    const Heads& of = block->heads;
    const int turned = of.heads + of.shared, all = turned + of.shared;
    const long size = of.size, asked = block->asked * size;
    std::vector<bf16> normed(size_t(batch) * block->hidden), given(block->order ? size_t(batch) * asked : 0);
    normalize(block->before_attention, x, batch, block->hidden, normed.data());
    multiply(block->q_k_v, block->asking, normed.data(), batch, block->order ? given.data() : q_k_v, threads);
    const auto norm = [=](const Norm& norm, bf16* heads, int count) {
        normalize(norm, heads, block->whole ? 1 : count, int(block->whole ? count * size : size), heads);
    };
    for (int i = 0; i < batch; ++i) {
        bf16* heads = q_k_v + i * all * size;
        for (int h = 0; block->order && h < all; ++h)
            std::copy_n(given.data() + i * asked + block->order[h] * size, size, heads + h * size);
        norm(block->queries, heads, of.heads);
        norm(block->keys, heads + of.heads * size, of.shared);
        for (int h = 0; h < turned; ++h) rotate(heads + h * size, cos, sin, of.turning);
    }
}

// The rest of the block: x (B, hidden) becomes the block's output, from the attention's (B, heads size).
void maquette_finish(const Block* block, const bf16* attended, bf16* x, int batch, int threads) {
    const int hidden = block->hidden;
    const long n = long(batch) * hidden;
    std::vector<bf16> found(n), y(n);
    multiply(&block->o, 1, attended, batch, found.data(), threads);
    normalize(block->behind_attention, found.data(), batch, hidden, found.data());
    if (!block->beside) {
        add(x, found.data(), n);
        normalize(block->behind_sum, x, batch, hidden, x);
    }
    normalize(block->before_mlp, x, batch, hidden, y.data());
    feed_forward(*block, y.data(), batch, y.data(), threads);
    normalize(block->behind_mlp, y.data(), batch, hidden, y.data());
    if (block->beside) add(y.data(), found.data(), n);
    add(x, y.data(), n);
    normalize(block->behind_all, x, batch, hidden, x);
}
}
