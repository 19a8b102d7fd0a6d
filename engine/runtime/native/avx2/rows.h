// Blocks of 16 rows of W times a few rows of x: AVX2, eight rows of W at a time. What is done with each byte of a weight
// must fit beside the loads: codes become float32 numbers without error, where they stand in their four bytes, and meet
// inputs that are divided by the power of two by which they are too large.
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

namespace {  // so that what one function alone calls becomes part of it

constexpr int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of the columns in a row's four bytes of INT4, lowest bits first

// Eight rows of the next columns of a packed block, 64 bytes away from their next ones.
template <int KIND> struct Codes;
template <> struct Codes<Matrix::INT4> {
    static constexpr int COLUMNS = 8, HALF = 32, OFFSET = 8;  // columns; bytes from the block's upper rows to its lower
    static __m256i read(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
    // The t-th column in the order of the bits, plus OFFSET, times 16^t but for the last.
    template <int T> static __m256 number(__m256i codes) {
        if (T == 7) return _mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 28));
        return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15 << 4 * (T % 7))));
    }
    static int column(int t) { return ORDER[t]; }
    static float factor(int t) { return t == 7 ? 1.0f : 1.0f / float(1 << 4 * t); }
};
template <> struct Codes<Matrix::INT8> {
    static constexpr int COLUMNS = 2, HALF = 16, OFFSET = 0;
    static __m256i read(const uint8_t* from) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)from)); }
    // The first column times 2^24, the second times 2^8.
    template <int T> static __m256 number(__m256i codes) {
        return _mm256_cvtepi32_ps(T == 0 ? _mm256_slli_epi32(codes, 24) : _mm256_and_si256(codes, _mm256_set1_epi32(~255)));
    }
    static int column(int t) { return t; }
    static float factor(int t) { return t == 0 ? 1.0f / (1 << 24) : 1.0f / (1 << 8); }
};
template <int KIND> constexpr int BYTES = 2 * Codes<KIND>::HALF;  // of sixteen rows of the columns that are read at once

// Rows of x in float32. For packed layouts (columns, m), in the order of the codes and divided by their factors; for dense
// weights (m, columns up to a multiple of 16), of 16 first those at even places.
using Arranged = float;
template <int KIND> std::vector<float> arrange_packed(const bf16* x, int columns, int m) {
    std::vector<float> all(size_t(columns) * m);
    for (int k = 0; k < columns; ++k) {
        const int t = k % Codes<KIND>::COLUMNS, from = k - t + Codes<KIND>::column(t);
        for (int i = 0; i < m; ++i) all[size_t(k) * m + i] = widen(x[long(i) * columns + from]) * Codes<KIND>::factor(t);
    }
    return all;
}
[[maybe_unused]] std::vector<Arranged> arrange(const Matrix& w, const bf16* x, int m) {
    if (w.kind == Matrix::INT4) return arrange_packed<Matrix::INT4>(x, w.columns, m);
    if (w.kind == Matrix::INT8) return arrange_packed<Matrix::INT8>(x, w.columns, m);
    const int wide = (w.columns + 15) / 16 * 16;
    std::vector<float> all(size_t(wide) * m);
    for (int i = 0; i < m; ++i)
        for (int k = 0; k < w.columns; ++k)
            all[size_t(i) * wide + k / 16 * 16 + k % 2 * 8 + k % 16 / 2] = widen(x[long(i) * w.columns + k]);
    return all;
}

// Whether `packed_block` wants the sum of each group of x.
[[maybe_unused]] bool wants_sums(const Matrix& w) { return w.zero != nullptr || w.kind == Matrix::INT4; }

// sums[][i] += the products of the T-th column and those after it with row i of x.
template <int KIND, int M, int CHAINS, int T = 0>
inline __attribute__((always_inline)) void add_columns(__m256i codes, const float* x, __m256 (&sums)[CHAINS][M]) {
    const __m256 number = Codes<KIND>::template number<T>(codes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
        sums[T % CHAINS][i] = _mm256_fmadd_ps(number, _mm256_broadcast_ss(x + T * M + i), sums[T % CHAINS][i]);
    if constexpr (T + 1 < Codes<KIND>::COLUMNS) add_columns<KIND, M, CHAINS, T + 1>(codes, x, sums);
}

// totals[i] = the products of row i of x with the 16 rows of W in `block`.
template <int KIND, int M>
void packed_block(const Matrix& w, long block, const Arranged* x, const float* x_sums, Floats* totals) {
    using Kind = Codes<KIND>;
    constexpr int CHAINS = M <= 2 ? std::min(4, Kind::COLUMNS) : M <= 4 ? 2 : 1;
    const int groups = w.columns / w.group;
    for (int half = 0; half < 2; ++half) {
        const uint8_t* codes =
            (const uint8_t*)w.weight + block * (w.columns / Kind::COLUMNS) * BYTES<KIND> + half * Kind::HALF;
        const Arranged* inputs = x;
        __m256 found[M];
        std::fill(found, found + M, _mm256_setzero_ps());
        for (int g = 0; g < groups; ++g) {
            __m256 sums[CHAINS][M];
            for (auto& chain : sums) std::fill(chain, chain + M, _mm256_setzero_ps());
            for (int c = 0; c < w.group / Kind::COLUMNS; ++c, codes += BYTES<KIND>, inputs += Kind::COLUMNS * M)
                add_columns<KIND, M, CHAINS>(Kind::read(codes), inputs, sums);
            const long at = (block * groups + g) * ROWS + half * 8;
            const __m256 scale = widened(_mm_loadu_si128((const __m128i*)(w.scale + at)));
            __m256 zero = _mm256_set1_ps(Kind::OFFSET);
            if (w.zero) zero = zero + load_eight(w.zero + at);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                __m256 sum = sums[0][i];
                for (int j = 1; j < CHAINS; ++j) sum = sum + sums[j][i];
                if (wants_sums(w)) sum = _mm256_fnmadd_ps(zero, _mm256_broadcast_ss(x_sums + g * M + i), sum);
                found[i] = _mm256_fmadd_ps(sum, scale, found[i]);
            }
        }
        for (int i = 0; i < M; ++i) (half ? totals[i].high : totals[i].low) = found[i];
    }
}

template <int M> void dense_block(const Matrix& w, long block, const bf16*, const Arranged* x, Floats* totals) {
    alignas(32) float found[M][ROWS] = {};
    const int wide = (w.columns + 15) / 16 * 16;
    constexpr int CHAINS = M <= 2 ? 4 : M <= 4 ? 2 : 1;
    for (int r = 0; r < ROWS && block * ROWS + r < w.rows; ++r) {
        const bf16* row = (const bf16*)w.weight + (block * ROWS + r) * w.columns;
        __m256 sums[CHAINS][M];
        for (auto& chain : sums) std::fill(chain, chain + M, _mm256_setzero_ps());
        const auto add = [&](const bf16* from, int k, __m256* chain, __m256* other) {
            const __m256i pairs = _mm256_loadu_si256((const __m256i*)from);
            const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                chain[i] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + size_t(i) * wide + k), chain[i]);
                other[i] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + size_t(i) * wide + k + 8), other[i]);
            }
        };
        int k = 0;
        for (; k + 32 <= w.columns; k += 32) {
            add(row + k, k, sums[0], sums[CHAINS / 2]);
            add(row + k + 16, k + 16, sums[CHAINS / 4], sums[CHAINS / 2 + CHAINS / 4]);
        }
        for (; k < w.columns; k += 16) add(Part<bf16>(row + k, lanes(w.columns - k)).values, k, sums[0], sums[CHAINS / 2]);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            for (int j = 1; j < CHAINS; ++j) sums[0][i] = sums[0][i] + sums[j][i];
            found[i][r] = sum(sums[0][i]);
        }
    }
    for (int i = 0; i < M; ++i) totals[i] = load(found[i]);
}

// Inputs rounded to eight bits, in sixteen, of which the processor multiplies and adds pairs.
using Step = int16_t;
constexpr int MIDDLE = 0;
[[maybe_unused]] void store_steps(Step* to, Floats steps, Lanes count) {
    const auto ends = [](__m256 part) {  // to nearest, ties to even
        const __m256i codes = _mm256_min_epi32(_mm256_cvtps_epi32(part), _mm256_set1_epi32(127));
        return _mm256_max_epi32(codes, _mm256_set1_epi32(-128));
    };
    alignas(32) Step found[16];
    _mm256_store_si256((__m256i*)found, shortened(ends(steps.low), ends(steps.high)));
    std::memcpy(to, found, size_t(count) * sizeof(Step));
}

[[maybe_unused]] __m256i sixteen(const int8_t* from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); }

// As `dense_block`, in integers.
template <int M>
void bytes_block(const Matrix& w, long block, const Step* codes, const float* scales, Floats* totals) {
    alignas(32) float found[M][ROWS] = {};
    for (int r = 0; r < ROWS && block * ROWS + r < w.rows; ++r) {
        const long at = block * ROWS + r;
        const int8_t* row = (const int8_t*)w.weight + at * w.columns;
        __m256i sums[M];
        std::fill(sums, sums + M, _mm256_setzero_si256());
        int k = 0;
        for (; k + 16 <= w.columns; k += 16) {
            const __m256i weights = sixteen(row + k);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
                const __m256i inputs = _mm256_loadu_si256((const __m256i*)(codes + size_t(i) * w.columns + k));
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(weights, inputs));
            }
        }
        if (k < w.columns) {
            const __m256i weights = sixteen(Part<int8_t>(row + k, w.columns - k).values);
            for (int i = 0; i < M; ++i) {
                const Part<Step> part(codes + size_t(i) * w.columns + k, w.columns - k);
                const __m256i inputs = _mm256_load_si256((const __m256i*)part.values);
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(weights, inputs));
            }
        }
        for (int i = 0; i < M; ++i) {
            __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums[i]), _mm256_extracti128_si256(sums[i], 1));
            four = _mm_hadd_epi32(four, four);
            const int32_t sum = _mm_cvtsi128_si32(_mm_hadd_epi32(four, four));
            found[i][r] = float(sum) * scales[i] * widen(w.scale[at]);
        }
    }
    for (int i = 0; i < M; ++i) totals[i] = load(found[i]);
}

}  // namespace
