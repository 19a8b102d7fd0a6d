// 64 rows of X^T at a time times 64 columns of X, by tiles of 16 x 16.
#pragma once
#include <cstdint>

#include "tiles.h"

namespace {

constexpr int PAIRS = SIDE;  // of tokens at a time

// A panel of X^T, for some panels of X.
class Rows {
  public:
    explicit Rows(long pairs) : pairs(pairs), rows(new Line[pairs * PARTS]) {}

    // Its tiles (64 / 16, pairs / 16): a row is a column of X, and has all tokens one after another.
    void take(const uint32_t* panel) {
        for (long t = 0; t < pairs; t += SIDE)
            for (int part = 0; part < PARTS; ++part) {
                __m512i square[SIDE];
                for (int i = 0; i < SIDE; ++i) square[i] = _mm512_loadu_si512(panel + (t + i) * PANEL + part * SIDE);
                transpose(square);
                for (int i = 0; i < SIDE; ++i) _mm512_store_si512(&rows[part * pairs + t + i], square[i]);
            }
        Tiles::written();
    }

    // `last` rows and `left` columns of the result: out = keep * out + weight * the products of all pairs of tokens.
    void times(const uint32_t* columns, float keep, float weight, float* out, long stride, int last, long left) const {
        alignas(64) float found[4][SIDE][SIDE];
        for (int row = 0; row < last; row += 2 * SIDE)
            for (int column = 0; column < std::min<long>(left, PANEL); column += 2 * SIDE) {
                zero_sums();
                two_by_two<false>(&rows[row / SIDE * pairs], pairs, columns + column, BY_COLUMNS, int(pairs / SIDE));
                store_sums(found[0], found[1], found[2], found[3]);
                for (int tile = 0; tile < 4; ++tile)
                    for (int i = 0, down = row + tile % 2 * SIDE; i < SIDE && down + i < last; ++i) {
                        const int right = column + tile / 2 * SIDE;
                        const __mmask16 mask = lanes(std::max(0L, left - right));
                        float* at = out + (down + i) * stride + right;
                        const __m512 before = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, at), _mm512_set1_ps(keep));
                        const __m512 sums = _mm512_load_ps(found[tile][i]);
                        _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(sums, _mm512_set1_ps(weight), before));
                    }
            }
    }

  private:
    const Tiles here;
    const long pairs;
    const Lines rows;
};

}  // namespace
