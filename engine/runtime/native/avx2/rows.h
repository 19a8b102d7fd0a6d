// Blocks of 16 rows of W times a few rows of x: AVX2, eight rows of W at a time. What is done with each byte of a weight
// must fit beside the loads: codes and inputs are multiplied as whole numbers of sixteen bits, of which the processor
// multiplies and adds pairs, twice as many at once as float32 numbers.
#pragma once
#include <algorithm>

#include "inputs.h"

namespace {  // so that what one function alone calls becomes part of it

// Eight rows of the next 64 bytes of a packed block as `PAIRS` vectors of sixteen bits: (8 rows, 2 columns) each.
template <int KIND> struct Codes;
template <> struct Codes<Matrix::INT4> {
    static constexpr int PAIRS = 4, HALF = 32, OFFSET = 8;  // bytes from the block's upper rows to its lower
    // Codes plus OFFSET; where they are `SHIFTED`, every second vector is 16 times as large, and made without a shift.
    template <bool SHIFTED> static void unpack(const uint8_t* from, __m256i* pairs) {
        const __m256i low = _mm256_set1_epi16(15), high = _mm256_set1_epi16(15 << 4);
        const __m256i first = _mm256_loadu_si256((const __m256i*)from), second = _mm256_srli_epi16(first, 8);
        pairs[0] = _mm256_and_si256(first, low);
        pairs[1] = _mm256_and_si256(SHIFTED ? first : _mm256_srli_epi16(first, 4), SHIFTED ? high : low);
        pairs[2] = _mm256_and_si256(second, low);
        pairs[3] = SHIFTED ? _mm256_and_si256(second, high) : _mm256_srli_epi16(first, 12);
    }
};
template <> struct Codes<Matrix::INT8> {
    static constexpr int PAIRS = 2, HALF = 16, OFFSET = 0;
    static __m256i sixteen(const uint8_t* from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); }
    template <bool> static void unpack(const uint8_t* from, __m256i* pairs) {
        pairs[0] = sixteen(from);
        pairs[1] = sixteen(from + 32);
    }
};
template <int KIND> constexpr int COLUMNS = 2 * Codes<KIND>::PAIRS;  // whose codes lie in 64 bytes

constexpr int AHEAD = 2048;  // bytes by which codes are asked of memory before they are wanted: a tenth less time

// sum += the products of pairs, lane by lane. In this order: g++ would add products first, and keep the sums in memory.
[[maybe_unused]] inline void add_pairs(__m256i& sum, __m256i a, __m256i b) {
    __m256i more = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    asm("" : "+x"(more));
    sum = more;
}

// totals[i] = the products of row i of x with the 16 rows of W in `block`.
template <int KIND, int M> void packed_block(const Matrix& w, long block, const Inputs& in, Floats* totals) {
    using Kind = Codes<KIND>;
    constexpr int PAIRS = Kind::PAIRS, TOGETHER = M <= 4 ? 2 : 1;  // halves of a block
    constexpr bool SHIFTED = KIND == Matrix::INT4 && M <= 2;
    const long groups = w.columns / w.group, steps = in.chunk / COLUMNS<KIND>;
    for (int half = 0; half < 2; half += TOGETHER) {
        const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / COLUMNS<KIND>) * 64 + half * Kind::HALF;
        const int32_t* x = in.pairs.data();
        __m256 found[TOGETHER][M];
        for (auto& rows : found) std::fill(rows, rows + M, _mm256_setzero_ps());
        for (size_t part = 0; part < in.parts.size(); ++part) {
            const auto [column, group] = in.parts[part];
            const uint8_t* from = codes + column / COLUMNS<KIND> * 64;
            __m256i sums[TOGETHER][SHIFTED + 1][M];
            for (auto& kinds : sums)
                for (auto& rows : kinds) std::fill(rows, rows + M, _mm256_setzero_si256());
            for (int c = 0; c < steps; ++c, from += 64, x += PAIRS * M) {
                _mm_prefetch((const char*)from + AHEAD, _MM_HINT_T0);
                __m256i pairs[TOGETHER][PAIRS];
                for (int h = 0; h < TOGETHER; ++h) Kind::template unpack<SHIFTED>(from + h * Kind::HALF, pairs[h]);
#pragma GCC unroll 4
                for (int j = 0; j < PAIRS; ++j)
#pragma GCC unroll 8
                    for (int i = 0; i < M; ++i) {
                        const __m256i input = _mm256_set1_epi32(x[j * M + i]);
#pragma GCC unroll 2
                        for (int h = 0; h < TOGETHER; ++h)
                            add_pairs(sums[h][SHIFTED ? j % 2 : 0][i], pairs[h][j], input);
                    }
            }
#pragma GCC unroll 2
            for (int h = 0; h < TOGETHER; ++h) {
                const long at = (block * groups + group) * ROWS + (half + h) * 8;
                const __m256 scale = widened(_mm_loadu_si128((const __m128i*)(w.scale + at)));
                const __m256 zero = w.zero ? load_eight(w.zero + at) : _mm256_setzero_ps();
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i) {
                    __m256i sum = sums[h][0][i];
                    if (SHIFTED) sum = _mm256_add_epi32(sum, _mm256_srai_epi32(sums[h][SHIFTED][i], 4));
                    const int inputs = in.sums[part * M + i];
                    __m256 number = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(Kind::OFFSET * inputs)));
                    if (w.zero) number = _mm256_fnmadd_ps(zero, _mm256_set1_ps(float(inputs)), number);
                    found[h][i] = _mm256_fmadd_ps(number, scale * _mm256_set1_ps(in.steps[part * M + i]), found[h][i]);
                }
            }
        }
        for (int h = 0; h < TOGETHER; ++h)
            for (int i = 0; i < M; ++i) (half + h ? totals[i].high : totals[i].low) = found[h][i];
    }
}

template <int M> void dense_block(const Matrix& w, long block, const bf16*, const Inputs& in, Floats* totals) {
    alignas(32) float found[M][ROWS] = {};
    const float* x = in.wide.data();
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
[[maybe_unused]] void store_steps(Step* to, Floats steps, Lanes count) {  // of -128..127
    alignas(32) Step found[16];
    const __m256i codes = shortened(_mm256_cvtps_epi32(steps.low), _mm256_cvtps_epi32(steps.high));  // ties to even
    _mm256_store_si256((__m256i*)found, codes);
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
                add_pairs(sums[i], weights, inputs);
            }
        }
        if (k < w.columns) {
            const __m256i weights = sixteen(Part<int8_t>(row + k, w.columns - k).values);
            for (int i = 0; i < M; ++i) {
                const Part<Step> part(codes + size_t(i) * w.columns + k, w.columns - k);
                const __m256i inputs = _mm256_load_si256((const __m256i*)part.values);
                add_pairs(sums[i], weights, inputs);
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
