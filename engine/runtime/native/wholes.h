// Rows of inputs as whole numbers, for the products with packed codes (AVX2, and what has more).
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "products.h"

namespace {

// Rows of x, some columns of a group at a time, as whole numbers of sixteen bits, the largest with fifteen, times a
// power of two for each row: pairs of them are multiplied with codes faster than any other numbers. A bfloat16 number has eight bits, so whatever is at least a 128th of the largest is
// exact, and nothing is changed by more than a 128th of what bfloat16 rounds in the largest. Where one number is so large
// that more than a thousandth of the others is lost beside it, a second part holds what the first one rounded away.
struct Wholes {
    struct Part {
        int column, group;  // the first of its columns; the group they belong to
    };
    int chunk = 0;               // columns of a part
    std::vector<Part> parts;
    std::vector<int32_t> pairs;  // (parts, chunk / 2, m): two neighbours of a row each
    std::vector<float> steps;    // (parts, m)
    std::vector<int32_t> sums;   // (parts, m): of the whole numbers
};

constexpr int CHUNK = 128;  // columns whose products a lane can sum: 64 pairs, each below 2^24

// Divide `size` numbers into whole ones, for the pairs of row `i` of m, and what is left of them, kept in place.
// Returns whether that matters.
[[maybe_unused]] bool divide(float* numbers, int size, Wholes& in, int i, int m) {
    const __m256i sign = _mm256_set1_epi32(0x7fffffff);
    __m256i highest = _mm256_setzero_si256();  // bits have the order of the numbers, and NaN comes last
    __m256 before = _mm256_setzero_ps(), after = before;
    for (int k = 0; k < size; k += 8) {
        const __m256i bits = _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(numbers + k)), sign);
        highest = _mm256_max_epi32(highest, bits);
        before = before + _mm256_castsi256_ps(bits);
    }
    alignas(32) int32_t each[8];
    _mm256_store_si256((__m256i*)each, highest);
    const int32_t bits = *std::max_element(each, each + 8);
    const auto power = [](int exponent) {  // of two
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((exponent + 127) << 23)));
    };
    const int exponent = std::max(bits >> 23, 15) - 127 - 14;
    const __m256 factor = _mm256_set1_ps(power(-exponent)), step = _mm256_set1_ps(power(exponent));
    __m256i sum = _mm256_setzero_si256();
    alignas(32) int32_t pairs[CHUNK / 2];
    for (int k = 0; k < size; k += 16) {
        __m256i whole[2];
        for (int j = 0; j < 2; ++j) {
            const __m256 number = _mm256_loadu_ps(numbers + k + 8 * j);
            whole[j] = _mm256_cvtps_epi32(number * factor);
            const __m256 rest = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(whole[j]), step, number);
            _mm256_storeu_ps(numbers + k + 8 * j, rest);
            after = after + _mm256_and_ps(rest, _mm256_castsi256_ps(sign));
        }
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[0], whole[1]), 0xd8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
        _mm256_store_si256((__m256i*)(pairs + k / 2), both);
    }
    const size_t part = in.parts.size() - 1, half = in.chunk / 2;
    for (size_t k = 0; k < half; ++k) in.pairs[(part * half + k) * m + i] = pairs[k];
    _mm256_store_si256((__m256i*)each, sum);
    in.sums[part * m + i] = std::accumulate(each, each + 8, 0);
    const bool finite = bits < 0x7f800000;
    in.steps[part * m + i] = finite ? power(exponent) : NAN;
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    const auto total = [](__m256 numbers) {
        alignas(32) float each[8];
        _mm256_store_ps(each, numbers);
        return std::accumulate(each, each + 8, 0.0f);
    };
    return finite && total(after) > (total(before) - largest) / 1024;
}

[[maybe_unused]] Wholes whole_numbers(const Matrix& w, const bf16* x, int m) {
    Wholes in;
    const int together = w.kind == Matrix::INT4 ? 8 : 4;  // columns whose codes cannot be parted
    in.chunk = std::min(w.group, CHUNK) / together * together;
    while (w.group % in.chunk) in.chunk -= together;
    const int wide = (in.chunk + 15) / 16 * 16;
    std::vector<float> rows(size_t(m) * wide);
    in.pairs.reserve(size_t(w.columns) / 2 * m);
    for (int column = 0; column < w.columns; column += in.chunk) {
        for (int i = 0; i < m; ++i)
            for (int k = 0; k < in.chunk; k += 16) {
                const Lanes count = lanes(in.chunk - k);
                store(&rows[i * wide + k], load(x + long(i) * w.columns + column + k, count));
            }
        bool more = true;
        for (int part = 0; part < 2 && more; ++part) {
            in.parts.push_back({column, column / w.group});
            in.pairs.resize(in.parts.size() * in.chunk / 2 * m);
            in.steps.resize(in.parts.size() * m);
            in.sums.resize(in.parts.size() * m);
            more = false;
            for (int i = 0; i < m; ++i) more |= divide(&rows[i * wide], wide, in, i, m);
        }
    }
    return in;
}

}  // namespace
