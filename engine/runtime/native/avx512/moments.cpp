// Second moments of many rows: the upper half of X^T X in float32 from X in bfloat16.
//
// X is ordered once so that the processor's dot products read it, two tokens of 64 columns at a time: both factors come
// from there. A square of the result is then computed as tiles of 6 x 64 in registers over all tokens. Each number is
// the sum of the same products in the same order whatever the threads do.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int PANEL = 64, TILE = 6;                // columns of a panel; rows of a tile: 24 sums in registers
constexpr long SQUARE = 256, SMALL = 2048;         // sides of squares that threads take, of matrices from this size on
constexpr long ENOUGH = 1 << 20;                   // products that are worth another thread

// 16 numbers of token `t`, each in the low half of a lane; divided by its length where there are lengths.
__m512i read(const bf16* x, const float* lengths, long t, long size, long column) {
    const __mmask16 mask = lanes(size - column);
    const bf16* from = x + t * size + column;
    if (lengths == nullptr) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    const __m512 scaled = _mm512_div_ps(load(from, mask), _mm512_set1_ps(lengths[t]));
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(scaled));
}

// (tokens / 2, 64 columns, 2 tokens) of one panel; zeros past the last token and column.
void order(const bf16* x, const float* lengths, long tokens, long size, long panel, uint32_t* to) {
    for (long t = 0; t < tokens; t += 2, to += PANEL)
        for (int part = 0; part < PANEL; part += 16) {
            const long column = std::min(panel * PANEL + part, size);
            const __m512i first = read(x, lengths, t, size, column);
            const __m512i second = t + 1 < tokens ? read(x, lengths, t + 1, size, column) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + part, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
}

// M rows and 64 columns of the result: out = keep * out + weight * the products of all pairs of tokens.
template <int M> void tile(const uint32_t* rows, const uint32_t* columns, long pairs, float keep, float weight, float* out,
                           long stride, long left) {
    __m512 sums[M][4];
    for (auto& row : sums) std::fill(row, row + 4, _mm512_setzero_ps());
    for (long t = 0; t < pairs; ++t, rows += PANEL, columns += PANEL) {
        __m512i b[4];
        for (int part = 0; part < 4; ++part) b[part] = _mm512_loadu_si512(columns + part * 16);
        for (int i = 0; i < M; ++i) {
            const __m512i a = _mm512_set1_epi32(int(rows[i]));
            for (int part = 0; part < 4; ++part) sums[i][part] = dot(sums[i][part], b[part], a);
        }
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {  // no `break`: with it g++ would keep all sums in memory
        const __mmask16 mask = lanes(std::max(0L, left - part * 16));
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            float* at = out + i * stride + part * 16;
            const __m512 before = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, at), _mm512_set1_ps(keep));
            _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(sums[i][part], _mm512_set1_ps(weight), before));
        }
    }
}

using Tile = void (*)(const uint32_t*, const uint32_t*, long, float, float, float*, long, long);
constexpr Tile TILES[TILE + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

}  // namespace

// out (size, size) = keep * out + weight * x^T x on and above the diagonal; x (tokens, size), each token divided by its
// length, or as it is where `lengths` is null. Below the diagonal, at most 64 from it, stands what nobody should read.
extern "C" void maquette_second_moments(const bf16* x, const float* lengths, long tokens, long size, float keep,
                                        float weight, float* out, int threads) {
    const long panels = (size + PANEL - 1) / PANEL, pairs = (tokens + 1) / 2;
    const long side = size < SMALL ? 1 : SQUARE / PANEL, squares = (panels + side - 1) / side;
    std::vector<uint32_t> ordered(size_t(panels) * std::max(pairs, 1L) * PANEL);  // a place also for no tokens
    threads = int(std::min<long>(threads, 1 + tokens * size * size / ENOUGH));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long p = 0; p < panels; ++p) order(x, lengths, tokens, size, p, &ordered[size_t(p) * pairs * PANEL]);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < squares * squares; ++task) {
            const long up = task / squares, right = task % squares;
            if (right < up) continue;
            for (long i = up * side; i < std::min(panels, (up + 1) * side); ++i)
                for (long j = std::max(i, right * side); j < std::min(panels, (right + 1) * side); ++j) {
                    const uint32_t* rows = &ordered[size_t(i) * pairs * PANEL];
                    const uint32_t* columns = &ordered[size_t(j) * pairs * PANEL];
                    const int last = int(std::min<long>(PANEL, size - i * PANEL));
                    for (int row = 0; row < last; row += TILE) {
                        float* at = out + (i * PANEL + row) * size + j * PANEL;
                        TILES[std::min(TILE, last - row)](rows + row, columns, pairs, keep, weight, at, size, size - j * PANEL);
                    }
                }
        }
    }
}
