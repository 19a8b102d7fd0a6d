// A decoder block for one new token of each sequence, and the functions that Python calls. Families differ in what its
// struct says: norms of four kinds wherever one may stand, an order of heads, how much of a head turns, an MLP with
// gates or without, in turn with attention or beside it, or a mixture of them. Roundings to bfloat16 stand where
// `transformers` has them, so that only the order of sums differs.
#include <algorithm>
#include <cmath>
#include <utility>
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

// Mirrored by `Mlp` in library.py.
struct Mlp {
    int32_t inner, rising, gated, act;  // inner: numbers of the feed-forward; rising: matrices of up
    Matrix up[2], down;                 // up: the gate first, where there is one
};

// Mirrored by `Mixture` in library.py.
struct Mixture {
    int32_t count, chosen;    // experts, and how many a token goes to
    int32_t normed, rounded;  // whether the weights of those that are chosen add up to one, and are bfloat16
    int32_t shares;           // whether another one behind the experts computes all tokens, times its gate's sigmoid
    Matrix router, gate;
    const Mlp* experts;
};

// Mirrored by `Block` in library.py.
struct Block {
    Heads heads;
    Norm before_attention, queries, keys;     // queries, keys: of each head, or with `whole` of all of them together
    Norm behind_attention, behind_sum;        // of what attention gave; of x with it
    Norm before_mlp, behind_mlp, behind_all;  // behind_all: of x with what the MLP gave
    int32_t hidden;
    int32_t asking, asked;                    // matrices of q_k_v, and heads that they give
    int32_t whole, beside;                    // beside: the MLP reads x as it was before attention
    const int32_t* order;                     // (heads + 2 shared) among those asked; null: they stand so
    Matrix q_k_v[3], o;
    Mlp mlp;
    const Mixture* mixture;                   // in the MLP's place; null: there is none
};

constexpr long BUSY = 1 << 13;  // numbers between the products of MLPs that are worth another thread

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

// Some rows of x on their way through an MLP.
struct Passage {
    const Mlp* mlp;
    const bf16* x;  // (rows, hidden)
    int rows;
    bf16* out;      // (rows, hidden); may be x where it is of this passage alone
};

// out = down(act(up x)), or down(act(gate x) up x), of all passages; and what else their x is multiplied with.
void feed_forward(const std::vector<Passage>& passages, int hidden, int threads, const Product* beside = nullptr) {
    const auto apart = [](const Mlp& mlp) { return long(mlp.inner) * (mlp.gated ? 2 : 1); };
    std::vector<size_t> starts{0};  // of each one's numbers between its products
    for (const auto& [mlp, x, rows, out] : passages) starts.push_back(starts.back() + rows * apart(*mlp));
    std::vector<bf16> wide(starts.back());
    std::vector<Product> up, down;
    for (size_t i = 0; i < passages.size(); ++i) {
        const auto& [mlp, x, rows, out] = passages[i];
        bf16* to = &wide[starts[i]];
        down.push_back({&mlp->down, to, rows, out, hidden});
        for (int j = 0; j < mlp->rising; to += mlp->up[j++].rows) up.push_back({mlp->up + j, x, rows, to, apart(*mlp)});
    }
    if (beside) up.push_back(*beside);
    multiply(up.data(), int(up.size()), threads);
#pragma omp parallel for num_threads(int(std::min<long>(threads, 1 + starts.back() / BUSY))) schedule(dynamic)
    for (size_t i = 0; i < passages.size(); ++i) {
        const auto& [mlp, x, rows, out] = passages[i];
        bf16* const here = &wide[starts[i]];
        // Each row ends where it begins or before, and is read before the next one is written.
        ACTIVATES[mlp->act](here, mlp->gated ? here + mlp->inner : nullptr, apart(*mlp), rows, mlp->inner, here);
    }
    multiply(down.data(), int(down.size()), threads);
}

// Which experts each token goes to, and the weight of each, (B, chosen); of equal ones those that torch's topk takes.
std::vector<std::pair<float, int>> choose(const Mixture& mixture, const bf16* x, int batch, int threads) {
    const int count = mixture.count, chosen = mixture.chosen;
    std::vector<bf16> logits(size_t(batch) * count);
    multiply(&mixture.router, 1, x, batch, logits.data(), threads);
    std::vector<std::pair<float, int>> found, ranked(count);
    const auto likelier = [](const auto& a, const auto& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    for (int i = 0; i < batch; ++i) {
        const bf16* row = &logits[size_t(i) * count];
        float largest = -INFINITY, total = 0;
        for (int e = 0; e < count; ++e) largest = std::max(largest, widen(row[e]));
        for (int e = 0; e < count; ++e) total += (ranked[e] = {std::exp(widen(row[e]) - largest), e}).first;
        for (auto& each : ranked) each.first /= total;
        const auto end = ranked.begin() + chosen;
        if (chosen * 64 <= count) {
            std::partial_sort(ranked.begin(), end, ranked.end(), likelier);
        } else {
            std::nth_element(ranked.begin(), end - 1, ranked.end(), likelier);
            std::sort(ranked.begin(), end - 1, likelier);
        }
        total = 0;
        for (auto each = ranked.begin(); each < end; ++each) total += each->first;
        for (auto each = ranked.begin(); each < end; ++each) {
            if (mixture.normed) each->first /= total;
            if (mixture.rounded) each->first = widen(narrow(each->first));
            found.push_back(*each);
        }
    }
    return found;
}

// out (B, hidden) = the weighted sum of what the experts give that the router chose for each x (B, hidden), and what
// the shared one gives. An expert computes its tokens together; all experts are computed side by side.
void mix(const Mixture& mixture, const bf16* x, int batch, int hidden, bf16* out, int threads) {
    const int count = mixture.count, chosen = mixture.chosen, choices = batch * chosen;
    const auto choice = choose(mixture, x, batch, threads);
    std::vector<int> starts(count + 1), rows(choices);  // of each expert; of each choice, where experts stand in order
    for (const auto& [weight, expert] : choice) ++starts[expert + 1];
    for (int e = 0; e < count; ++e) starts[e + 1] += starts[e];
    std::vector<int> next = starts;
    for (int i = 0; i < choices; ++i) rows[i] = next[choice[i].second]++;

    std::vector<bf16> given(size_t(choices + batch) * hidden), gates(batch);
    std::vector<bf16> taken(batch > 1 ? size_t(choices) * hidden : 0);  // rows of x by experts, where x is not one row
    for (int i = 0; batch > 1 && i < choices; ++i)
        std::copy_n(x + long(i / chosen) * hidden, hidden, &taken[size_t(rows[i]) * hidden]);
    std::vector<Passage> passages;
    for (int e = 0; e < count; ++e) {
        const size_t start = size_t(starts[e]) * hidden;
        const int tokens = starts[e + 1] - starts[e];
        if (tokens) passages.push_back({mixture.experts + e, batch > 1 ? &taken[start] : x, tokens, &given[start]});
    }
    bf16* const shared = &given[size_t(choices) * hidden];
    const Product gate{&mixture.gate, x, batch, gates.data(), 1};
    if (mixture.shares) passages.push_back({mixture.experts + count, x, batch, shared});
    feed_forward(passages, hidden, threads, mixture.shares ? &gate : nullptr);

    for (int i = 0; i < batch; ++i)
        for (int k = 0; k < hidden; k += 16) {
            const Lanes mask = lanes(hidden - k);
            Floats sum = zeros();
            for (int j = i * chosen; j < (i + 1) * chosen; ++j) {
                const Floats one = load(&given[size_t(rows[j]) * hidden + k], mask) * all(choice[j].first);
                sum = sum + (mixture.rounded ? rounded(one) : one);
            }
            if (mixture.shares) {
                const Floats open = rounded(sigmoid(all(widen(gates[i]))));
                sum = rounded(sum) + rounded(open * load(shared + long(i) * hidden + k, mask));
            }
            store(out + long(i) * hidden + k, sum, mask);
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
    if (block->mixture) mix(*block->mixture, y.data(), batch, hidden, y.data(), threads);
    else feed_forward({{&block->mlp, y.data(), batch, y.data()}}, hidden, threads);
    normalize(block->behind_mlp, y.data(), batch, hidden, y.data());
    if (block->beside) add(y.data(), found.data(), n);
    add(x, y.data(), n);
    normalize(block->behind_all, x, batch, hidden, x);
}
}
