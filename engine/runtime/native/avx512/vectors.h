// bfloat16 numbers and vectors of sixteen float32, shared by the kernels: AVX-512 with its products of bfloat16 pairs.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

using bf16 = uint16_t;
using Floats = __m512;    // with + - * / of their own
using Lanes = __mmask16;  // which of them count

constexpr int VECTORS = 4;  // of Floats; four times as many, and what they need, are held in registers

inline float widen(bf16 value) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int32_t(uint32_t(value) << 16))));
}

inline bf16 narrow(float value) {  // to nearest, ties to even
    return bf16(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0));
}

// Weights that are soon read, from two pages away into the second cache: processors fetch ahead by themselves only within
// a page (Sapphire Rapids, two cores, one row of x times 4,096 x 1,024: 4 bits 198 us without this, 142 with; 8 bits 358
// and 236; into the first cache it is a little slower).
inline void fetch(const void* weights) { _mm_prefetch((const char*)weights + 8192, _MM_HINT_T1); }

inline Lanes lanes(long left) { return left >= 16 ? Lanes(0xffff) : Lanes((1u << left) - 1); }

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }

inline Floats load(const bf16* from, Lanes mask = 0xffff) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
inline Floats load(const float* from, Lanes mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, from); }
inline Floats load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
inline Floats load(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
// The lower and the upper halves of sixteen bytes.
inline void load_halves(const uint8_t* from, Floats& lower, Floats& upper) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    lower = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)));
    upper = _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 4));
}

inline void store(bf16* to, Floats values, Lanes mask = 0xffff) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}
inline void store(float* to, Floats values, Lanes mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, values); }
inline void store(uint8_t* to, Floats values, Lanes mask) {  // whole numbers
    _mm512_mask_cvtepi32_storeu_epi8(to, mask, _mm512_cvtps_epi32(values));
}

inline Floats rounded(Floats values) {  // to bfloat16 and back
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values)), 16));
}
inline Floats nearest(Floats values) { return _mm512_roundscale_ps(values, 8); }  // whole number, ties to even

inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }        // a b + c
inline Floats fused_less(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }   // a b - c
inline Floats less_fused(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b

inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats absolute(Floats values) { return _mm512_abs_ps(values); }

inline float sum(Floats values) { return _mm512_reduce_add_ps(values); }
inline float largest(Floats values) { return _mm512_reduce_max_ps(values); }
inline Floats only(Lanes mask, Floats values) { return _mm512_maskz_mov_ps(mask, values); }  // zero elsewhere

// sum + the products of pairs, lane by lane
inline Floats dot(Floats sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// The product of two vectors of `size` numbers.
inline float inner(const bf16* a, const bf16* b, int size) {
    Floats sums = zeros();
    for (int k = 0; k < size; k += 32) {
        const __mmask32 mask = size - k >= 32 ? ~__mmask32(0) : (__mmask32(1) << (size - k)) - 1;
        sums = dot(sums, _mm512_maskz_loadu_epi16(mask, a + k), _mm512_maskz_loadu_epi16(mask, b + k));
    }
    return sum(sums);
}

// e^x, relative error below 2e-7: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]. Beyond -150 and 150 it is
// as there, zero and infinite: what rounding leaves of larger numbers is no small rest.
inline Floats exponential(Floats x) {
    x = larger(all(-150), smaller(all(150), x));
    const Floats n = nearest(x * all(1.44269504f));
    Floats r = less_fused(x, n, all(0.693359375f));  // ln 2 in two parts
    r = less_fused(r, n, all(-2.12194440e-4f));
    Floats y = all(1.0f / 720);
    for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fused(y, r, all(factor));
    return _mm512_scalef_ps(y, n);
}
