// bfloat16 numbers and vectors of sixteen float32, shared by the kernels: AVX2, two vectors of eight.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

using bf16 = uint16_t;
using Lanes = int;  // how many of the first numbers count

struct Floats {
    __m256 low, high;
};

constexpr int VECTORS = 1;  // of Floats; four times as many, and what they need, are held in registers

inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }

inline float widen(bf16 value) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int32_t(uint32_t(value) << 16))));
}

inline Lanes lanes(long left) { return int(std::min(left, 16L)); }

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

// Eight numbers in the upper halves of their lanes.
inline __m256 widened(__m128i values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

// bfloat16 in the lower halves of the lanes: to nearest, ties to even; what is no number stays none.
inline __m256i narrowed(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, none), 16);
}

// The first `count` of 16 values of whichever kind, zeros after them.
template <typename T> struct Part {
    alignas(32) T values[16] = {};
    Part(const T* from, int count) { std::memcpy(values, from, size_t(count) * sizeof(T)); }
};

inline Floats load(const bf16* from, Lanes count = 16) {
    if (count < 16) return load(Part<bf16>(from, count).values);
    const __m256i values = _mm256_loadu_si256((const __m256i*)from);
    return {widened(_mm256_castsi256_si128(values)), widened(_mm256_extracti128_si256(values, 1))};
}
inline Floats load(const float* from, Lanes count = 16) {
    if (count < 16) return load(Part<float>(from, count).values);
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
inline __m256 load_eight(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
inline Floats load(const int8_t* from) { return {load_eight(from), load_eight(from + 8)}; }
inline __m256 load_eight(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
inline Floats load(const uint8_t* from) { return {load_eight(from), load_eight(from + 8)}; }
// The lower and the upper halves of sixteen bytes.
inline void load_halves(const uint8_t* from, Floats& lower, Floats& upper) {
    const auto eight = [](const uint8_t* from) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); };
    const __m256i a = eight(from), b = eight(from + 8), mask = _mm256_set1_epi32(15);
    lower = {_mm256_cvtepi32_ps(_mm256_and_si256(a, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(b, mask))};
    upper = {_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4))};
}

inline void store(bf16* to, Floats values, Lanes count = 16) {
    const __m256i pairs = _mm256_packus_epi32(narrowed(values.low), narrowed(values.high));
    alignas(32) bf16 found[16];
    _mm256_store_si256((__m256i*)found, _mm256_permute4x64_epi64(pairs, 0xd8));
    if (count == 16) _mm256_storeu_si256((__m256i*)to, _mm256_load_si256((const __m256i*)found));
    else std::memcpy(to, found, size_t(count) * sizeof(bf16));
}
inline void store(float* to, Floats values, Lanes count = 16) {
    if (count < 16) {
        alignas(32) float found[16];
        store(found, values);
        std::memcpy(to, found, size_t(count) * sizeof(float));
    } else {
        _mm256_storeu_ps(to, values.low);
        _mm256_storeu_ps(to + 8, values.high);
    }
}
// Sixteen int32 as int16, those beyond their ends at the ends.
inline __m256i shortened(__m256i low, __m256i high) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
}
inline void store(uint8_t* to, Floats values, Lanes count) {  // whole numbers
    const __m256i shorts = shortened(_mm256_cvtps_epi32(values.low), _mm256_cvtps_epi32(values.high));
    alignas(16) uint8_t found[16];
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
    _mm_store_si128((__m128i*)found, bytes);
    std::memcpy(to, found, size_t(count));
}

inline Floats rounded(Floats values) {  // to bfloat16 and back
    return {_mm256_castsi256_ps(_mm256_slli_epi32(narrowed(values.low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(narrowed(values.high), 16))};
}
inline bf16 narrow(float value) {  // to nearest, ties to even
    return bf16(_mm256_extract_epi16(narrowed(_mm256_set1_ps(value)), 0));
}
inline __m256 nearest(__m256 values) { return _mm256_round_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats nearest(Floats values) { return {nearest(values.low), nearest(values.high)}; }  // ties to even

inline Floats fused(Floats a, Floats b, Floats c) {  // a b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fused_less(Floats a, Floats b, Floats c) {  // a b - c
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats less_fused(Floats c, Floats a, Floats b) {  // c - a b
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats absolute(Floats values) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, values.low), _mm256_andnot_ps(sign, values.high)};
}

inline float sum(__m256 values) {
    __m128 four = _mm256_castps256_ps128(values) + _mm256_extractf128_ps(values, 1);
    four = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float sum(Floats values) { return sum(values.low + values.high); }
inline float largest(Floats values) {
    alignas(32) float found[16];
    store(found, values);
    return *std::max_element(found, found + 16);
}
inline Floats only(Lanes count, Floats values) {  // zero elsewhere
    if (count == 16) return values;
    alignas(32) float found[16];
    store(found, values);
    return load(Part<float>(found, count).values);
}

// The product of two vectors of `size` numbers.
inline float inner(const bf16* a, const bf16* b, int size) {
    Floats sums = zeros();
    for (int k = 0; k < size; k += 16) sums = fused(load(a + k, lanes(size - k)), load(b + k, lanes(size - k)), sums);
    return sum(sums);
}

// e^x, relative error below 2e-7: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]. Beyond -87 and 88,
// where float32 ends, it is as there.
inline Floats exponential(Floats x) {
    x = larger(all(-87), smaller(all(88), x));
    const Floats n = nearest(x * all(1.44269504f));
    Floats r = less_fused(x, n, all(0.693359375f));  // ln 2 in two parts
    r = less_fused(r, n, all(-2.12194440e-4f));
    Floats y = all(1.0f / 720);
    for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fused(y, r, all(factor));
    const auto power = [](__m256 n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
    };
    return y * Floats{power(n.low), power(n.high)};
}
