// 64 rows of W at a time in the order in which the processor's dot products, and its tiles, read them.
#pragma once
#include <algorithm>

#include "rows.h"

namespace {

constexpr int PANEL = 64;  // rows of W

// Columns first .. last - 1 of a panel of INT4 or INT8 codes in bfloat16, ordered (columns / 2, 64 rows, 2 columns);
// zeros past the last row. `first` is a multiple of a packed chunk's columns.
template <int KIND> void unpack_panel(const Matrix& w, long panel, int first, int last, uint32_t* to) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS;
    const int groups = w.columns / w.group;
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    alignas(64) uint16_t places[32];  // of sixteen numbers of even columns, then of odd ones, one by one
    for (int i = 0; i < 32; ++i) places[i] = uint16_t(i / 2 + i % 2 * 16);
    const __m512i mixed = _mm512_load_si512(places);
    for (int part = 0; part < PANEL / ROWS; ++part) {
        const long block = panel * (PANEL / ROWS) + part;
        uint32_t* at = to + part * ROWS;
        if (block >= blocks(w)) {
            for (int k = first; k < last; k += 2, at += PANEL) _mm512_storeu_si512(at, _mm512_setzero_si512());
            continue;
        }
        const uint8_t* codes = (const uint8_t*)w.weight + (block * (w.columns / STEP) + first / STEP) * 64;
        for (int g = first / w.group, k = first; k < last; ++g) {
            const __m512 scale = load(w.scale + (block * groups + g) * ROWS);
            const __m512 zero = w.zero ? load(w.zero + (block * groups + g) * ROWS) : zeros();
            for (const int end = std::min(last, (g + 1) * w.group); k < end; k += STEP, codes += 64) {
                __m512i pairs[PAIRS];
                Codes<KIND>::unpack(codes, pairs);
                for (int j = 0; j < PAIRS; ++j, at += PANEL) {
                    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[j], 16));
                    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs[j], upper));
                    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((odd - zero) * scale, (even - zero) * scale);
                    _mm512_storeu_si512(at, _mm512_permutexvar_epi16(mixed, both));
                }
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

// Columns first .. last - 1 (multiples of 4) of 64 rows of INT8_INT8 codes, ordered (columns / 4, 64 rows, 4 columns);
// zeros past the last row.
inline void order_panel(const Matrix& w, long panel, int first, int last, uint32_t* to) {
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
                _mm512_storeu_si512(to + ((k - first) / 4 + j) * PANEL + part * ROWS, square[j]);
        }
    }
}

}  // namespace
