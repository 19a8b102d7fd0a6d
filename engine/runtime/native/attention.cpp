// Attention of one new token of each sequence to all up to itself: to keys and values as they are, and to packed ones,
// which are read as codes. A token's score is q . k; with k = code scale + low, and scales and lows that a group of
// tokens shares, that is (q scale) . code + q . low, whose factors are computed once for the group. Values share theirs
// within a token, so that its weight w becomes w scale for its codes, and w low for the sum of all.
#include <algorithm>
#include <cmath>
#include <vector>

#include "heads.h"

namespace {

// What one block holds, for each of `batch` sequences and of the heads that they share. Mirrored by `Packed` in
// library.py. With 4 bits channel d stands in the lower half of a byte, d + size / 2 in the upper.
struct Packed {
    bf16 *keys, *values;                  // newest tokens (newest, size)
    const uint8_t *key_codes;             // (groups, size, group), 4 bits: (groups, size / 2, group)
    const uint8_t *value_codes;           // (groups group, size), 4 bits: (groups group, size / 2)
    const bf16 *key_scale, *key_low;      // (groups, size)
    const bf16 *value_scale, *value_low;  // (size / group, groups group)
    int32_t bits, group, groups, newest;  // group: tokens of keys and channels of values, whole vectors of 16
};

// The scores of keys (length, size).
void score(const bf16* q, const bf16* keys, long length, int size, float scale, float* scores) {
    for (long t = 0; t < length; ++t) scores[t] = inner(q, keys + t * size, size) * scale;
}

// What a family does with the scores of a head before their softmax; bias: of the head, from the first that is seen on.
void bend(float* scores, long length, const Heads& heads, const float* bias) {
    const Floats cap = all(heads.cap), twice = all(2 / heads.cap);
    for (long t = 0; t < length; t += 16) {
        const Lanes mask = lanes(length - t);
        Floats s = load(scores + t, mask);
        if (bias) s = s + load(bias + t, mask);
        if (heads.coarse) s = rounded(s);
        if (heads.cap > 0) s = less_fused(cap, all(2) * cap, all(1) / (all(1) + exponential(twice * s)));  // cap tanh
        store(scores + t, s, mask);
    }
}

bool bends(const Heads& heads) { return heads.bias || heads.coarse || heads.cap > 0; }

// The bias of a head, from the place `first` on.
const float* bias_of(const Heads& heads, long head, long first) {
    return heads.bias ? heads.bias + head * heads.room + first : nullptr;
}

// Scores become weights, e^(score - the highest); returns their sum.
float soften(float* scores, long length) {
    Floats greatest = all(scores[0]), sums = zeros();
    long whole = 0;
    for (; whole + 16 <= length; whole += 16) greatest = larger(greatest, load(scores + whole));
    float highest = largest(greatest);
    for (; whole < length; ++whole) highest = std::max(highest, scores[whole]);
    for (long t = 0; t < length; t += 16) {
        const Lanes mask = lanes(length - t);
        const Floats e = exponential(load(scores + t, mask) - all(highest));
        store(scores + t, e, mask);
        sums = sums + only(mask, e);
    }
    return sum(sums);
}

// sums (size) += weights times values (length, size)
void weigh(const float* weights, const bf16* values, long length, int size, float* sums) {
    for (int k = 0; k < size; k += 64) {  // four vectors at a time
        Floats found[4];
        Lanes masks[4];
        for (int j = 0; j < 4; ++j) {
            masks[j] = lanes(std::max(0, size - k - 16 * j));
            found[j] = load(sums + k + 16 * j, masks[j]);
        }
        for (long t = 0; t < length; ++t)
            for (int j = 0; j < 4; ++j)
                found[j] = fused(all(weights[t]), load(values + t * size + k + 16 * j, masks[j]), found[j]);
        for (int j = 0; j < 4; ++j) store(sums + k + 16 * j, found[j], masks[j]);
    }
}

void finish(const float* sums, float whole, int size, bf16* out) {
    for (int k = 0; k < size; k += 16) {
        const Lanes mask = lanes(size - k);
        store(out + k, load(sums + k, mask) / all(whole), mask);
    }
}

// Sixteen codes, and the sixteen that stand `apart` behind them, or with 4 bits in the same bytes.
template <int BITS> inline void load_codes(const uint8_t* from, long apart, Floats& first, Floats& second) {
    if (BITS == 4) return load_halves(from, first, second);
    first = load(from), second = load(from + apart);
}

// `score` of `groups` groups of packed keys; factors: room for `size` numbers. TOGETHER vectors of tokens at a time.
template <int BITS, int TOGETHER>
void score_codes(const bf16* q, const uint8_t* codes, const bf16* scales, const bf16* lows, long groups, int group,
                 int size, float scale, float* factors, float* scores) {
    const int half = size / 2;
    for (long g = 0; g < groups; ++g, scales += size, lows += size, codes += long(half) * group * (BITS / 4)) {
        Floats base = zeros();
        for (int k = 0; k < size; k += 16) {
            const Floats asked = load(q + k) * all(scale);
            store(factors + k, asked * load(scales + k));
            base = fused(asked, load(lows + k), base);
        }
        const Floats least = all(sum(base));
        for (int t = 0; t < group; t += 16 * TOGETHER) {
            Floats found[TOGETHER][2];
            for (auto& pair : found) pair[0] = least, pair[1] = zeros();
            for (int d = 0; d < half; ++d) {
                const Floats first = all(factors[d]), second = all(factors[half + d]);
                for (int j = 0; j < TOGETHER; ++j) {
                    Floats a, b;
                    load_codes<BITS>(codes + long(d) * group + t + 16 * j, long(half) * group, a, b);
                    found[j][0] = fused(first, a, found[j][0]);
                    found[j][1] = fused(second, b, found[j][1]);
                }
            }
            for (int j = 0; j < TOGETHER; ++j) store(scores + g * group + t + 16 * j, found[j][0] + found[j][1]);
        }
    }
}

// `weigh` of packed values (length, size); scales and lows `apart` from group to group; factors: room for length
// numbers of each group. TOGETHER vectors of channels of either half at a time.
template <int BITS, int TOGETHER>
void weigh_codes(const float* weights, const uint8_t* codes, const bf16* scales, const bf16* lows, long apart,
                 long length, int group, int size, float* factors, float* sums) {
    const int half = size / 2, row = half * (BITS / 4);
    for (int g = 0; g < size / group; ++g) {
        Floats base = zeros();
        for (long t = 0; t < length; t += 16) {  // whole groups of tokens
            const Floats weight = load(weights + t);
            store(factors + g * length + t, weight * load(scales + g * apart + t));
            base = fused(weight, load(lows + g * apart + t), base);
        }
        const Floats least = all(sum(base));
        for (int k = g * group; k < (g + 1) * group; k += 16) store(sums + k, load(sums + k) + least);
    }
    for (int k = 0; k < half; k += 16 * TOGETHER) {
        Floats found[TOGETHER][2];
        const float* of[TOGETHER][2];
        for (int j = 0; j < TOGETHER; ++j)
            for (int side = 0; side < 2; ++side) {
                const int channel = side * half + k + 16 * j;
                found[j][side] = load(sums + channel);
                of[j][side] = factors + channel / group * length;
            }
        for (long t = 0; t < length; ++t)
            for (int j = 0; j < TOGETHER; ++j) {
                Floats a, b;
                load_codes<BITS>(codes + t * row + k + 16 * j, half, a, b);
                found[j][0] = fused(all(of[j][0][t]), a, found[j][0]);
                found[j][1] = fused(all(of[j][1][t]), b, found[j][1]);
            }
        for (int j = 0; j < TOGETHER; ++j)
            for (int side = 0; side < 2; ++side) store(sums + side * half + k + 16 * j, found[j][side]);
    }
}

// One query (size) and what it attends to: of head `head` the packed tokens, then `recent` newest ones.
template <int BITS>
void attend_packed(const bf16* q, const Packed& held, const Heads& of, long head, const float* bias, long packed,
                   long recent, std::vector<float>& room, bf16* out) {
    const int size = of.size;
    const float scale = of.scale;
    const long groups = packed / held.group, tokens = long(held.groups) * held.group, each = size / held.group;
    room.resize(packed + recent + size + std::max(long(size), each * packed));
    float *weights = room.data(), *sums = weights + packed + recent, *factors = sums + size;
    const long codes = head * tokens * size / (8 / BITS), key_scales = head * held.groups * size;
    const long value_scales = head * each * tokens, newest = head * held.newest * size;
    const auto scoring = held.group % 32 ? score_codes<BITS, 1> : score_codes<BITS, 2>;
    scoring(q, held.key_codes + codes, held.key_scale + key_scales, held.key_low + key_scales, groups, held.group, size,
            scale, factors, weights);
    score(q, held.keys + newest, recent, size, scale, weights + packed);
    if (bends(of)) bend(weights, packed + recent, of, bias);
    const float whole = soften(weights, packed + recent);
    std::fill(sums, sums + size, 0.0f);
    const auto weighing = size % 64 ? weigh_codes<BITS, 1> : weigh_codes<BITS, 2>;
    weighing(weights, held.value_codes + codes, held.value_scale + value_scales, held.value_low + value_scales, tokens,
             packed, held.group, size, factors, sums);
    weigh(weights + packed, held.values + newest, recent, size, sums);
    finish(sums, whole, size, out);
}

// Put the new keys and values of q_k_v (B, heads + 2 shared, size) at `at` of keys and values (B, shared, room, size).
void keep(const Heads& of, const bf16* q_k_v, bf16* keys, bf16* values, int batch, long room, long at) {
    const int shared = of.shared, size = of.size, all = of.heads + 2 * shared;
    for (int i = 0; i < batch * shared; ++i) {
        const bf16* from = q_k_v + (long(i / shared) * all + of.heads + i % shared) * size;
        std::copy(from, from + size, keys + (i * room + at) * size);
        std::copy(from + shared * size, from + (shared + 1) * size, values + (i * room + at) * size);
    }
}

// As many of the threads as have enough to do.
int useful(int threads, const Heads& of, long batch, long tokens) {
    return int(std::min(long(threads), 1 + batch * of.heads * of.size * tokens / (1 << 14)));
}

}  // namespace

extern "C" {

// Put the new keys and values at `at` of keys and values (B, shared, room, size); out (B, heads, size): attention to
// those from `first` up to there.
void maquette_attend(const Heads* of, const bf16* q_k_v, bf16* keys, bf16* values, int batch, int room, int first,
                     int at, bf16* out, int threads) {
    const int heads = of->heads, shared = of->shared, size = of->size, all = heads + 2 * shared, seen = at + 1 - first;
    keep(*of, q_k_v, keys, values, batch, room, at);
#pragma omp parallel num_threads(useful(threads, *of, batch, seen))
    {
        std::vector<float> weights(seen), sums(size);
#pragma omp for schedule(static)
        for (int i = 0; i < batch * heads; ++i) {
            const int sequence = i / heads, head = i % heads;
            const long states = ((long(sequence) * shared + head / (heads / shared)) * room + first) * size;
            score(q_k_v + (long(sequence) * all + head) * size, keys + states, seen, size, of->scale, weights.data());
            if (bends(*of)) bend(weights.data(), seen, *of, bias_of(*of, head, first));
            const float whole = soften(weights.data(), seen);
            std::fill(sums.begin(), sums.end(), 0.0f);
            weigh(weights.data(), values + states, seen, size, sums.data());
            finish(sums.data(), whole, size, out + long(i) * size);
        }
    }
}

// As `maquette_attend`: to `packed` tokens, whole groups, and then the newest, where the new one is put at `recent`.
void maquette_attend_packed(const Heads* of, const bf16* q_k_v, const Packed* held, int batch, int packed, int recent,
                            bf16* out, int threads) {
    const int heads = of->heads, shared = of->shared, size = of->size, all = heads + 2 * shared;
    keep(*of, q_k_v, held->keys, held->values, batch, held->newest, recent);
    const auto attend = held->bits == 4 ? attend_packed<4> : attend_packed<8>;
#pragma omp parallel num_threads(useful(threads, *of, batch, packed + recent))
    {
        std::vector<float> room;
#pragma omp for schedule(static)
        for (int i = 0; i < batch * heads; ++i) {
            const int sequence = i / heads, head = i % heads;
            attend(q_k_v + (long(sequence) * all + head) * size, *held, *of,
                   long(sequence) * shared + head / (heads / shared), bias_of(*of, head, 0), packed, recent + 1, room,
                   out + long(i) * size);
        }
    }
}
}
