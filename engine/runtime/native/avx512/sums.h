// 64 rows of X^T at a time times 64 columns of X: sums of 6 x 64 in registers.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace {

constexpr int PANEL = 64, TILE = 6;  // columns of a panel; rows of a tile: 24 sums in registers
constexpr int PAIRS = 1;             // of tokens at a time

// M rows and 64 columns of the result: out = keep * out + weight * the products of all pairs of tokens.
template <int M> void tile(const uint32_t* rows, const uint32_t* columns, long pairs, float keep, float weight,
                           float* out, long stride, long left) {
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

// A panel of X^T, for some panels of X.
class Rows {
  public:
    explicit Rows(long pairs) : pairs(pairs) {}

    void take(const uint32_t* panel) { rows = panel; }

    // `last` rows and `left` columns of the result: out = keep * out + weight * the products of all pairs of tokens.
    void times(const uint32_t* columns, float keep, float weight, float* out, long stride, int last, long left) const {
        for (int row = 0; row < last; row += TILE)
            TILES[std::min(TILE, last - row)](rows + row, columns, pairs, keep, weight, out + row * stride, stride, left);
    }

  private:
    const long pairs;
    const uint32_t* rows = nullptr;
};

}  // namespace
