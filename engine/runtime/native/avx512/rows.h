// Blocks of 16 rows of W times a few rows of x: AVX-512 with products of bfloat16 pairs. What is done with each byte of
// a weight must fit beside the loads: codes become bfloat16 numbers without error and enter the processor's dot product
// of bfloat16 pairs with float32 sums; a group's sum is multiplied by its scale once. For one row of x less must be done:
// there both are whole numbers of sixteen bits.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "wholes.h"

namespace {  // so that what one function alone calls becomes part of it

// The sixteen levels code - 8 as bfloat16, twice, so that bit 4 of an index, which belongs to the next
// code, does not matter.
const __m512i LEVELS = [] {
    alignas(64) bf16 levels[32];
    for (int i = 0; i < 32; ++i) levels[i] = narrow(float(i % 16 - 8));
    return _mm512_load_si512(levels);
}();

// The next 64 bytes of a packed block as `PAIRS` vectors of bfloat16: (16 rows, 2 columns) each.
template <int KIND> struct Codes;
template <> struct Codes<Matrix::INT4> {
    static constexpr int PAIRS = 4;
    static void unpack(const uint8_t* from, __m512i* pairs) {
        const __m512i codes = _mm512_loadu_si512(from);
        pairs[0] = _mm512_permutexvar_epi16(codes, LEVELS);
        pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), LEVELS);
        pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), LEVELS);
        pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), LEVELS);
    }
};
template <> struct Codes<Matrix::INT8> {
    static constexpr int PAIRS = 2;
    static __m512 sixteen(const uint8_t* from) { return load((const int8_t*)from); }
    static void unpack(const uint8_t* from, __m512i* pairs) {
        pairs[0] = (__m512i)_mm512_cvtne2ps_pbh(sixteen(from + 16), sixteen(from));
        pairs[1] = (__m512i)_mm512_cvtne2ps_pbh(sixteen(from + 48), sixteen(from + 32));
    }
};

inline uint32_t pair(const bf16* from) {  // two neighbours, wherever they begin
    uint32_t both;
    std::memcpy(&both, from, sizeof both);
    return both;
}

// Rows of x as the packed layouts read them; dense weights read x.
struct Inputs {
    Wholes wholes;                // of one row, and then nothing else
    std::vector<uint32_t> pairs;  // (columns / 2, m): two neighbours of a row each
    std::vector<float> sums;      // (groups, m), for zero points; nothing where there are none
};
[[maybe_unused]] Inputs arrange(const Matrix& w, const bf16* x, int m) {
    Inputs in;
    if (w.kind == Matrix::DENSE) return in;
    if (m == 1) {
        in.wholes = whole_numbers(w, x, m);
        return in;
    }
    in.pairs.resize(size_t(w.columns) / 2 * m);
    if (w.zero) in.sums.resize(size_t(w.columns / w.group) * m);
    for (int i = 0; i < m; ++i) {
        const bf16* row = x + long(i) * w.columns;
        for (int k = 0; k < w.columns / 2; ++k) in.pairs[size_t(k) * m + i] = pair(row + 2 * k);
        for (int k = 0; w.zero && k < w.columns; ++k) in.sums[size_t(k / w.group) * m + i] += widen(row[k]);
    }
    return in;
}

// The next 64 bytes of a packed block as vectors of sixteen bits, (16 rows, 2 columns) each: codes plus OFFSET, of which
// every second vector is 16 times as large where that saves shifting it.
template <int KIND> struct Words;
template <> struct Words<Matrix::INT4> {
    static constexpr int OFFSET = 8, SHIFT = 4;
    static void unpack(const uint8_t* from, __m512i* pairs) {
        const __m512i low = _mm512_set1_epi16(15), high = _mm512_set1_epi16(15 << 4);
        const __m512i first = _mm512_loadu_si512(from), second = _mm512_srli_epi16(first, 8);
        pairs[0] = _mm512_and_si512(first, low);
        pairs[1] = _mm512_and_si512(first, high);
        pairs[2] = _mm512_and_si512(second, low);
        pairs[3] = _mm512_and_si512(second, high);
    }
};
template <> struct Words<Matrix::INT8> {
    static constexpr int OFFSET = 0, SHIFT = 0;
    static void unpack(const uint8_t* from, __m512i* pairs) {
        pairs[0] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
        pairs[1] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(from + 32)));
    }
};

// The products of one row of x with the 16 rows of W in `block`.
template <int KIND> Floats whole_block(const Matrix& w, long block, const Wholes& in) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS;
    const int groups = w.columns / w.group, steps = in.chunk / STEP;
    const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / STEP) * 64;
    const int32_t* x = in.pairs.data();
    Floats total = zeros();
    for (size_t part = 0; part < in.parts.size(); ++part) {
        const auto [column, group] = in.parts[part];
        const uint8_t* from = codes + column / STEP * 64;
        __m512i sums[PAIRS];
        std::fill(sums, sums + PAIRS, _mm512_setzero_si512());
        for (int c = 0; c < steps; ++c, from += 64, x += PAIRS) {
            __m512i pairs[PAIRS];
            fetch(from);
            Words<KIND>::unpack(from, pairs);
#pragma GCC unroll 4
            for (int j = 0; j < PAIRS; ++j) sums[j] = _mm512_dpwssd_epi32(sums[j], pairs[j], _mm512_set1_epi32(x[j]));
        }
        __m512i sum = sums[0], larger = sums[1];
        for (int j = 2; j < PAIRS; j += 2) sum = _mm512_add_epi32(sum, sums[j]), larger = _mm512_add_epi32(larger, sums[j + 1]);
        sum = _mm512_add_epi32(sum, _mm512_srai_epi32(larger, Words<KIND>::SHIFT));
        const int inputs = in.sums[part];
        Floats number = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(Words<KIND>::OFFSET * inputs)));
        const long at = (block * groups + group) * ROWS;
        if (w.zero) number = less_fused(number, load(w.zero + at), all(float(inputs)));
        total = fused(number, load(w.scale + at) * all(in.steps[part]), total);
    }
    return total;
}

// totals[i] = the products of row i of x with the 16 rows of W in `block`.
template <int KIND, int M>
void packed_block(const Matrix& w, long block, const Inputs& in, Floats* totals) {
    if constexpr (M == 1) {
        *totals = whole_block<KIND>(w, block, in.wholes);
        return;
    }
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS, CHAINS = M <= 2 ? PAIRS : 1;
    const int groups = w.columns / w.group;
    const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / STEP) * 64;
    const uint32_t* x = in.pairs.data();
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) totals[i] = zeros();
    for (int g = 0; g < groups; ++g) {
        __m512 sums[CHAINS][M];
        for (auto& chain : sums) std::fill(chain, chain + M, zeros());
        for (int c = 0; c < w.group / STEP; ++c, codes += 64, x += PAIRS * M) {
            __m512i pairs[PAIRS];
            fetch(codes);
            Codes<KIND>::unpack(codes, pairs);
            for (int j = 0; j < PAIRS; ++j)
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i)
                    sums[j % CHAINS][i] = dot(sums[j % CHAINS][i], pairs[j], _mm512_set1_epi32(int(x[j * M + i])));
        }
        const __m512 scale = load(w.scale + (block * groups + g) * ROWS);
        const __m512 zero = w.zero ? load(w.zero + (block * groups + g) * ROWS) : zeros();
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            __m512 sum = sums[0][i];
            for (int j = 1; j < CHAINS; ++j) sum = sum + sums[j][i];
            if (w.zero) sum = less_fused(sum, zero, all(in.sums[g * M + i]));
            totals[i] = fused(sum, scale, totals[i]);
        }
    }
}

template <int M> void dense_block(const Matrix& w, long block, const bf16* x, const Inputs&, Floats* totals) {
    alignas(64) float found[M][ROWS] = {};
    for (int r = 0; r < ROWS && block * ROWS + r < w.rows; ++r) {
        const bf16* row = (const bf16*)w.weight + (block * ROWS + r) * w.columns;
        constexpr int CHAINS = M <= 2 ? 4 : 1;
        __m512 sums[M][CHAINS];
        for (auto& chains : sums) std::fill(chains, chains + CHAINS, zeros());
        int k = 0;
        for (; k + 32 * CHAINS <= w.columns; k += 32 * CHAINS)
            for (int j = 0; j < CHAINS; ++j) {
                const __m512i weights = _mm512_loadu_si512(row + k + 32 * j);
                fetch(row + k + 32 * j);
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i)
                    sums[i][j] = dot(sums[i][j], weights, _mm512_loadu_si512(x + long(i) * w.columns + k + 32 * j));
            }
        for (; k < w.columns; k += 32) {
            const __mmask32 mask = w.columns - k >= 32 ? ~__mmask32(0) : (__mmask32(1) << (w.columns - k)) - 1;
            const __m512i weights = _mm512_maskz_loadu_epi16(mask, row + k);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i)
                sums[i][0] = dot(sums[i][0], weights, _mm512_maskz_loadu_epi16(mask, x + long(i) * w.columns + k));
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            for (int j = 1; j < CHAINS; ++j) sums[i][0] = sums[i][0] + sums[i][j];
            found[i][r] = sum(sums[i][0]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) totals[i] = _mm512_load_ps(found[i]);
}

// Inputs rounded to eight bits; plus 128, because the processor's dot product of bytes wants one unsigned side.
using Step = uint8_t;
constexpr int MIDDLE = 128;
[[maybe_unused]] void store_steps(Step* to, Floats steps, Lanes mask) {  // of -128..127
    const __m512i codes = _mm512_add_epi32(_mm512_cvtps_epi32(steps), _mm512_set1_epi32(MIDDLE));  // ties to even
    _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(codes));
}

// As `dense_block`, in integers.
template <int M>
void bytes_block(const Matrix& w, long block, const Step* codes, const float* scales, Floats* totals) {
    alignas(64) float found[M][ROWS] = {};
    for (int r = 0; r < ROWS && block * ROWS + r < w.rows; ++r) {
        const long at = block * ROWS + r;
        const int8_t* row = (const int8_t*)w.weight + at * w.columns;
        __m512i sums[M];
        std::fill(sums, sums + M, _mm512_setzero_si512());
        for (int k = 0; k < w.columns; k += 64) {
            const int left = w.columns - k;
            const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
            const __m512i weights = _mm512_maskz_loadu_epi8(mask, row + k);
            fetch(row + k);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i)
                sums[i] = _mm512_dpbusd_epi32(
                    sums[i], _mm512_maskz_loadu_epi8(mask, codes + size_t(i) * w.columns + k), weights);
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const int32_t sum = _mm512_reduce_add_epi32(sums[i]) - MIDDLE * w.sums[at];
            found[i][r] = float(sum) * scales[i] * widen(w.scale[at]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) totals[i] = _mm512_load_ps(found[i]);
}

}  // namespace
