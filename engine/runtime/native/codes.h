// Codes of the packed layouts as bfloat16 numbers, and inputs as bytes.
#pragma once
#include <vector>

#include "products.h"

constexpr int ROWS = 16;  // of W, one for each lane of a vector of float32
constexpr long ENOUGH = 1 << 16;  // products of a weight with an input that are worth another thread

inline long blocks(const Matrix& w) { return (w.rows + ROWS - 1) / ROWS; }

// The sixteen levels code - 8 as bfloat16, twice, so that bit 4 of an index, which belongs to the next
// code, does not matter.
static const __m512i LEVELS = [] {
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
    static __m512 sixteen(const uint8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    }
    static void unpack(const uint8_t* from, __m512i* pairs) {
        pairs[0] = (__m512i)_mm512_cvtne2ps_pbh(sixteen(from + 16), sixteen(from));
        pairs[1] = (__m512i)_mm512_cvtne2ps_pbh(sixteen(from + 48), sixteen(from + 32));
    }
};

inline __m512 load_zero(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))); }

// Rows of x rounded as `InputGrid.encode` does, in bfloat16; codes plus 128, because the dot product of bytes wants
// one unsigned side.
struct Bytes {
    std::vector<uint8_t> codes;  // (M, columns)
    std::vector<float> scales;   // (M)
};

inline Bytes encode(const Matrix& w, const bf16* inputs, long m, int threads) {
    Bytes in{std::vector<uint8_t>(size_t(m) * w.columns), std::vector<float>(m)};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < m; ++i) {
        const bf16* x = inputs + i * w.columns;
        __m512 largest = _mm512_setzero_ps();
        for (int k = 0; k < w.columns; k += 16)
            largest = _mm512_max_ps(largest, _mm512_abs_ps(load(x + k, lanes(w.columns - k))));
        float scale = widen(narrow(w.input_scale != 0 ? w.input_scale : _mm512_reduce_max_ps(largest) / 127.5f));
        if (scale == 0) scale = 0.0078125f;  // bfloat16's epsilon
        in.scales[i] = scale;
        for (int k = 0; k < w.columns; k += 16) {
            const __mmask16 mask = lanes(w.columns - k);
            const __m512 steps = rounded(_mm512_div_ps(load(x + k, mask), _mm512_set1_ps(scale)));
            __m512i codes = _mm512_cvtps_epi32(steps);  // to nearest, ties to even
            codes = _mm512_max_epi32(_mm512_min_epi32(codes, _mm512_set1_epi32(127)), _mm512_set1_epi32(-128));
            codes = _mm512_add_epi32(codes, _mm512_set1_epi32(128));
            _mm_mask_storeu_epi8(&in.codes[size_t(i) * w.columns + k], mask, _mm512_cvtepi32_epi8(codes));
        }
    }
    return in;
}
