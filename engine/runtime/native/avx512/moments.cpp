// Second moments of many rows: the upper half of X^T X in float32 from X in bfloat16.
//
// X is ordered once so that the processor's dot products read it, two tokens of 64 columns at a time: both factors come
// from there. A square of the result is then computed panel by panel over all tokens (`sums.h`). Each number is the sum
// of the same products in the same order whatever the threads do.
#include <algorithm>
#include <vector>

#include <sums.h>  // the best that the processor has: not always the one beside this file

namespace {

constexpr long SQUARE = 256, SMALL = 2048;  // sides of squares that threads take, of matrices from this size on
constexpr long ANOTHER = 1 << 20;           // products that are worth another thread

// 16 numbers of token `t`, each in the low half of a lane; divided by its length where there are lengths.
__m512i read(const bf16* x, const float* lengths, long t, long tokens, long size, long column) {
    if (t >= tokens) return _mm512_setzero_si512();
    const __mmask16 mask = lanes(size - column);
    const bf16* from = x + t * size + column;
    if (lengths == nullptr) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    const __m512 scaled = _mm512_div_ps(load(from, mask), _mm512_set1_ps(lengths[t]));
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(scaled));
}

// (pairs, 64 columns, 2 tokens) of one panel; zeros past the last token and column.
void order(const bf16* x, const float* lengths, long tokens, long size, long panel, long pairs, uint32_t* to) {
    for (long t = 0; t < 2 * pairs; t += 2, to += PANEL)
        for (int part = 0; part < PANEL; part += 16) {
            const long column = std::min(panel * PANEL + part, size);
            const __m512i first = read(x, lengths, t, tokens, size, column);
            const __m512i second = read(x, lengths, t + 1, tokens, size, column);
            _mm512_storeu_si512(to + part, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
}

}  // namespace

// out (size, size) = keep * out + weight * x^T x on and above the diagonal; x (tokens, size), each token divided by its
// length, or as it is where `lengths` is null. Below the diagonal, at most 64 from it, stands what nobody should read.
extern "C" void maquette_second_moments(const bf16* x, const float* lengths, long tokens, long size, float keep,
                                        float weight, float* out, int threads) {
    const long panels = (size + PANEL - 1) / PANEL, pairs = (tokens + 2 * PAIRS - 1) / (2 * PAIRS) * PAIRS;
    const long side = size < SMALL ? 1 : SQUARE / PANEL, squares = (panels + side - 1) / side;
    std::vector<uint32_t> ordered(size_t(panels) * std::max(pairs, 1L) * PANEL);  // a place also for no tokens
    threads = int(std::min<long>(threads, 1 + tokens * size * size / ANOTHER));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long p = 0; p < panels; ++p) order(x, lengths, tokens, size, p, pairs, &ordered[size_t(p) * pairs * PANEL]);
        Rows rows(pairs);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < squares * squares; ++task) {
            const long up = task / squares, right = task % squares;
            if (right < up) continue;
            for (long i = up * side; i < std::min(panels, (up + 1) * side); ++i) {
                rows.take(&ordered[size_t(i) * pairs * PANEL]);
                const int last = int(std::min<long>(PANEL, size - i * PANEL));
                for (long j = std::max(i, right * side); j < std::min(panels, (right + 1) * side); ++j)
                    rows.times(&ordered[size_t(j) * pairs * PANEL], keep, weight, out + i * PANEL * size + j * PANEL, size,
                               last, size - j * PANEL);
            }
        }
    }
}
