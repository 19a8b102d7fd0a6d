// 64 rows of W at a time in the order in which the processor's dot products, and its tiles, read them.
#pragma once
#include <algorithm>

#include "rows.h"

namespace {

constexpr int PANEL = 64;  // rows of W

// Where the numbers of 32 bits of a panel stand: one for each 16 rows of W, of one pair of columns after another.
struct Order {
    long part, step;  // from 16 rows to the next, and from pair to pair
};
constexpr Order BY_COLUMNS{ROWS, PANEL};  // (columns / 2, 64 rows, 2 columns)

// Two columns' codes of 16 rows, one beside the other, times the scales of their rows.
template <int KIND> class Scaled;

// They are looked up as bfloat16, and the products of pairs, of which one counts, are exact in float32.
template <> class Scaled<Matrix::INT4> {
  public:
    Scaled(const bf16* scale, const int8_t* zero) {
        const __m512i scales = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)scale));
        even = (__m512bh)scales;
        odd = (__m512bh)_mm512_slli_epi32(scales, 16);
        less = zero ? zeros() - load(zero) * load(scale) : zeros();
        alignas(64) uint16_t places[32];  // of sixteen numbers of even columns, then of odd ones, one by one
        for (int i = 0; i < 32; ++i) places[i] = uint16_t(i / 2 + i % 2 * 16);
        mixed = _mm512_load_si512(places);
    }
    void unpack(const uint8_t* codes, __m512i* out) const {
        Codes<Matrix::INT4>::unpack(codes, out);
        for (int j = 0; j < Codes<Matrix::INT4>::PAIRS; ++j) {
            const __m512 first = _mm512_dpbf16_ps(less, (__m512bh)out[j], even);
            const __m512 second = _mm512_dpbf16_ps(less, (__m512bh)out[j], odd);
            out[j] = _mm512_permutexvar_epi16(mixed, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
    }

  private:
    __m512bh even, odd;
    __m512 less;
    __m512i mixed;
};

// They stand as they are wanted, eight rows of both columns in a vector of float32.
template <> class Scaled<Matrix::INT8> {
  public:
    Scaled(const bf16* scale, const int8_t* zero) {
        const __m512 scales = load(scale), less = zero ? load(zero) * scales : zeros();
        for (int half = 0; half < 2; ++half) {
            alignas(64) int32_t rows[16];
            for (int i = 0; i < 16; ++i) rows[i] = half * 8 + i / 2;
            const __m512i places = _mm512_load_si512(rows);
            times[half] = _mm512_permutexvar_ps(places, scales);
            minus[half] = _mm512_permutexvar_ps(places, less);
        }
    }
    void unpack(const uint8_t* codes, __m512i* out) const {
        for (int j = 0; j < Codes<Matrix::INT8>::PAIRS; ++j, codes += 32) {
            const __m512 upper = _mm512_fmsub_ps(Codes<Matrix::INT8>::sixteen(codes), times[0], minus[0]);
            const __m512 lower = _mm512_fmsub_ps(Codes<Matrix::INT8>::sixteen(codes + 16), times[1], minus[1]);
            out[j] = (__m512i)_mm512_cvtne2ps_pbh(lower, upper);
        }
    }

  private:
    __m512 times[2], minus[2];
};

// Columns first .. last - 1 of a panel of INT4 or INT8 codes in bfloat16; zeros past the last row. `first` is a multiple
// of a packed chunk's columns.
template <int KIND> void unpack_panel(const Matrix& w, long panel, int first, int last, Order order, uint32_t* to) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS;
    const int groups = w.columns / w.group;
    for (int part = 0; part < PANEL / ROWS; ++part) {
        const long block = panel * (PANEL / ROWS) + part;
        uint32_t* at = to + part * order.part;
        if (block >= blocks(w)) {
            for (int k = first; k < last; k += 2, at += order.step) _mm512_storeu_si512(at, _mm512_setzero_si512());
            continue;
        }
        const uint8_t* codes = (const uint8_t*)w.weight + (block * (w.columns / STEP) + first / STEP) * 64;
        for (int g = first / w.group, k = first; k < last; ++g) {
            const long group = (block * groups + g) * ROWS;
            const Scaled<KIND> scaled(w.scale + group, w.zero ? w.zero + group : nullptr);
            for (const int end = std::min(last, (g + 1) * w.group); k < end; k += STEP, codes += 64) {
                __m512i pairs[PAIRS];
                scaled.unpack(codes, pairs);
                for (int j = 0; j < PAIRS; ++j, at += order.step) _mm512_storeu_si512(at, pairs[j]);
            }
        }
    }
}

// A square of 16 x 16 numbers of 32 bits the other way round.
inline void transpose(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // v[4 a + b]: column 4 c + b of rows 4 a .. 4 a + 3 in the quarter c
    for (int b = 0; b < 4; ++b) {
        const __m512i low = _mm512_shuffle_i32x4(v[b], v[4 + b], 0x44), high = _mm512_shuffle_i32x4(v[b], v[4 + b], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(v[8 + b], v[12 + b], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(v[8 + b], v[12 + b], 0xee);
        t[b] = _mm512_shuffle_i32x4(low, low2, 0x88);
        t[4 + b] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        t[8 + b] = _mm512_shuffle_i32x4(high, high2, 0x88);
        t[12 + b] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    std::copy(t, t + 16, v);
}

// The same of columns (multiples of 4) of INT8_INT8 codes, of which four are a number of 32 bits.
inline void order_panel(const Matrix& w, long panel, int first, int last, Order order, uint32_t* to) {
    for (int part = 0; part < PANEL / ROWS; ++part) {
        const long top = panel * PANEL + part * ROWS;
        for (int k = first; k < last; k += 64) {
            const int left = std::min(64, last - k);
            const __mmask64 mask = left == 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
            __m512i square[ROWS];
            for (int r = 0; r < ROWS; ++r)
                square[r] = top + r < w.rows
                                ? _mm512_maskz_loadu_epi8(mask, (const int8_t*)w.weight + (top + r) * w.columns + k)
                                : _mm512_setzero_si512();
            transpose(square);
            for (int j = 0; j < left / 4; ++j)
                _mm512_storeu_si512(to + ((k - first) / 4 + j) * order.step + part * order.part, square[j]);
        }
    }
}

}  // namespace
