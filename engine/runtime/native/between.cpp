// What stands between the products of a training step, and its gradients: each reads what it needs once, computes in
// float32, and writes what it makes once. Tensors are float32 or bfloat16, each as its owner has it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "some.h"

namespace {

constexpr long PIECE = 1 << 10;  // numbers that a thread takes at a time
// Weights of attention that are smaller, beside the largest, are none: gradients of e^-87 and less would have less than
// float32's digits, and products of such numbers take twenty times as long (where attention is sharp, most were).
constexpr float NOTHING = 1e-20f;

inline Floats sigmoid(Floats x) { return all(1) / (all(1) + exponential(zeros() - x)); }

// What a gate lets through, and by how much that grows with the gate.
struct Gate {
    Floats value, slope;
};

inline Gate silu(Floats x) {
    const Floats s = sigmoid(x), value = x * s;
    return {value, fused(value, all(1) - s, s)};
}

// 0.5 x (1 + tanh y), y = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 y).
inline Gate gelu(Floats x) {
    constexpr float FACTOR = 1.5957691216f, CUBE = 0.044715f;  // 2 sqrt(2 / pi)
    const Floats square = x * x, s = sigmoid(all(FACTOR) * x * fused(square, all(CUBE), all(1)));
    const Floats value = x * s, grows = all(FACTOR) * fused(square, all(3 * CUBE), all(1));
    return {value, fused(value * (all(1) - s), grows, s)};
}

// Calls f with what each 16 of `count` gates let through, with what finds the numbers at their places in another tensor
// of the same type, and with which of them count; kind: 0 SiLU, 1 GELU by tanh.
template <typename F> void gated(int kind, Some gate, long count, int threads, F f) {
    const auto all_by = [=](auto* gate, auto act) {
#pragma omp parallel for num_threads(worth(count, threads)) schedule(static)
        for (long start = 0; start < count; start += PIECE)
            each(std::min(PIECE, count - start), [&](long k, Lanes mask) {
                const auto numbers = [=](auto* from) { return (decltype(gate))from + start + k; };
                f(act(load(numbers(gate), mask)), numbers, mask);
            });
    };
    typed([=](auto* gate) {
        if (kind == 0) all_by(gate, [](Floats x) { return silu(x); });
        else all_by(gate, [](Floats x) { return gelu(x); });
    }, gate);
}

// Calls f, for each row of scores (batch, heads, tokens, keys), with the part that its token sees, where that begins
// among all, its length, and room for as many numbers; what it does not see becomes zero.
template <typename T, typename F>
void visible(T* scores, const long* shape, const int32_t* first, const int32_t* end, long step, int threads, F f) {
    const long batch = shape[0], heads = shape[1], tokens = shape[2], keys = shape[3], rows = heads * tokens;
#pragma omp parallel num_threads(worth(batch * rows * keys, threads))
    {
        std::vector<float> room(size_t(keys + 16));
#pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < batch; ++b)
            for (long row = 0; row < rows; ++row) {
                const long from = first[b * step + row % tokens], to = end[b * step + row % tokens];
                const long start = (b * rows + row) * keys;
                std::fill(scores + start, scores + start + from, T(0));
                std::fill(scores + start + to, scores + start + keys, T(0));
                f(scores + start + from, start + from, to - from, room.data());
            }
    }
}

}  // namespace

extern "C" {

// out = weight x / sqrt(mean of squares + epsilon), x (rows, size); inverse (rows): of the roots. Numbers of x that are
// bfloat16 are rounded before they are multiplied by the weight, as they are in `transformers`.
void maquette_rms_norm(Some x, const float* weight, long rows, long size, float epsilon, Some out, float* inverse,
                       int threads) {
    typed([=](auto* x, auto* out) {
#pragma omp parallel for num_threads(worth(rows * size, threads)) schedule(static)
        for (long i = 0; i < rows; ++i) {
            const auto* from = x + i * size;
            Floats squares = zeros();
            each(size, [&](long k, Lanes mask) {
                const Floats v = load(from + k, mask);
                squares = fused(v, v, squares);
            });
            inverse[i] = 1 / std::sqrt(sum(squares) / float(size) + epsilon);
            const Floats factor = all(inverse[i]);
            each(size, [&](long k, Lanes mask) {
                const Floats v = load(from + k, mask) * factor;
                store(out + i * size + k, (sizeof(*from) == 2 ? rounded(v) : v) * load(weight + k, mask), mask);
            });
        }
    }, x, out);
}

// The gradients of x and of the weight (size), from that of `out`; `of_weight` may be null.
void maquette_rms_norm_back(Some gradient, Some x, const float* weight, const float* inverse, long rows, long size,
                            Some of_x, float* of_weight, int threads) {
    const int parts = worth(rows * size, threads);
    std::vector<float> sums(of_weight ? size_t(parts * size) : 0);  // of each part of the rows
    typed([=, &sums](auto* gradient, auto* x, auto* of_x) {
#pragma omp parallel for num_threads(parts) schedule(static)
        for (int part = 0; part < parts; ++part)
            for (long i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
                const auto* g = gradient + i * size;
                const auto* from = x + i * size;
                Floats products = zeros();
                each(size, [&](long k, Lanes mask) {
                    products = fused(load(g + k, mask) * load(weight + k, mask), load(from + k, mask), products);
                });
                const float root = inverse[i];
                const Floats factor = all(root), back = all(root * root * root * sum(products) / float(size));
                each(size, [&](long k, Lanes mask) {
                    const Floats v = load(from + k, mask), scaled = load(g + k, mask) * factor;
                    store(of_x + i * size + k, fused_less(scaled, load(weight + k, mask), v * back), mask);
                    if (of_weight) {
                        float* total = sums.data() + part * size + k;
                        store(total, fused(scaled, v, load(total, mask)), mask);
                    }
                });
            }
    }, gradient, x, of_x);
    if (of_weight)
        for (long k = 0; k < size; ++k) {
            of_weight[k] = 0;
            for (int part = 0; part < parts; ++part) of_weight[k] += sums[size_t(part * size + k)];
        }
}

// out = act(gate) up, of `count` numbers, all of one type; kind: 0 SiLU, 1 GELU by tanh.
void maquette_gate(int kind, Some gate, const void* up, long count, void* out, int threads) {
    gated(kind, gate, count, threads, [=](Gate open, auto numbers, Lanes mask) {
        store(numbers(out), open.value * load(numbers(up), mask), mask);
    });
}

// The gradients of gate and up, from that of `out`.
void maquette_gate_back(int kind, Some gate, const void* up, const void* gradient, long count, void* of_gate,
                        void* of_up, int threads) {
    gated(kind, gate, count, threads, [=](Gate open, auto numbers, Lanes mask) {
        const Floats g = load(numbers(gradient), mask);
        store(numbers(of_gate), g * load(numbers(up), mask) * open.slope, mask);
        store(numbers(of_up), g * open.value, mask);
    });
}

// Rotates the pairs (i, i + size / 2) of each head by its token's angles, or with `back` by what turns gradients of the
// rotated into those of the heads. x, out: (batch, heads, tokens, wide), as far apart as x_steps, out_steps say (of
// batch, heads, tokens); cos, sin: (batch or 1, tokens, size), cos_step apart from sequence to sequence. What a head has
// beyond `size` is copied. shape: batch, heads, tokens, wide, size.
void maquette_rotate(Some x, const long* x_steps, Some cos, Some sin, long cos_step, const long* shape, int back,
                     Some out, const long* out_steps, int threads) {
    const long batch = shape[0], heads = shape[1], tokens = shape[2], wide = shape[3], size = shape[4], half = size / 2;
    typed([=](auto* x, auto* cos, auto* sin, auto* out) {
#pragma omp parallel for collapse(2) num_threads(worth(batch * heads * tokens * wide, threads)) schedule(static)
        for (long b = 0; b < batch; ++b)
            for (long t = 0; t < tokens; ++t) {
                const auto *c = cos + b * cos_step + t * size, *s = sin + b * cos_step + t * size;
                for (long h = 0; h < heads; ++h) {
                    const auto* from = x + b * x_steps[0] + h * x_steps[1] + t * x_steps[2];
                    auto* to = out + b * out_steps[0] + h * out_steps[1] + t * out_steps[2];
                    each(half, [&](long k, Lanes mask) {
                        const Floats first = load(from + k, mask), second = load(from + half + k, mask);
                        const Floats s1 = load(s + k, mask), s2 = load(s + half + k, mask);
                        const Floats c1 = first * load(c + k, mask), c2 = second * load(c + half + k, mask);
                        store(to + k, back ? fused(second, s2, c1) : less_fused(c1, second, s1), mask);
                        store(to + half + k, back ? less_fused(c2, first, s1) : fused(first, s2, c2), mask);
                    });
                    each(wide - size, [&](long k, Lanes mask) {
                        store(to + size + k, load(from + size + k, mask), mask);
                    });
                }
            }
    }, x, cos, sin, out);
}

// Scores (batch, heads, tokens, keys) become weights, softmax(scale score), in their place: each token sees the keys
// from `first` to before `end` (batch or 1, tokens), `step` apart from sequence to sequence; elsewhere are zeros.
void maquette_soften(Some scores, const long* shape, const int32_t* first, const int32_t* end, long step, float scale,
                     int threads) {
    typed([=](auto* scores) {
        visible(scores, shape, first, end, step, threads, [=](auto* at, long, long seen, float* room) {
            const long last = (seen - 1) / 16 * 16;
            store(room + last, all(-INFINITY));
            each(seen, [&](long k, Lanes mask) { store(room + k, load(at + k, mask) * all(scale), mask); });
            Floats greatest = load(room);
            for (long k = 16; k <= last; k += 16) greatest = larger(greatest, load(room + k));
            const Floats highest = all(largest(greatest));
            Floats sums = zeros();
            each(seen, [&](long k, Lanes mask) {
                const Floats e = larger(exponential(load(room + k) - highest) - all(NOTHING), zeros());
                store(room + k, e);
                sums = sums + only(mask, e);
            });
            const Floats factor = all(1 / sum(sums));
            each(seen, [&](long k, Lanes mask) { store(at + k, load(room + k) * factor, mask); });
        });
    }, scores);
}

// The gradients of scores, in the place of those of their weights.
void maquette_soften_back(Some gradients, const void* weights, const long* shape, const int32_t* first,
                          const int32_t* end, long step, float scale, int threads) {
    typed([=](auto* gradients) {
        visible(gradients, shape, first, end, step, threads, [=](auto* at, long place, long seen, float*) {
            const auto* weight = (decltype(gradients))weights + place;
            Floats products = zeros();
            each(seen, [&](long k, Lanes mask) {
                products = fused(load(at + k, mask), load(weight + k, mask), products);
            });
            const Floats mean = all(sum(products));
            each(seen, [&](long k, Lanes mask) {
                store(at + k, (load(at + k, mask) - mean) * load(weight + k, mask) * all(scale), mask);
            });
        });
    }, gradients);
}
}
