// Second moments of many rows: the upper half of X^T X in float32 from X in bfloat16.
//
// X is widened once, 48 columns side by side for each token: both factors come from there. The result is computed as
// tiles of 6 x 16 in registers over all tokens. Each number is the sum of the same products in the same order whatever
// the threads do.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int PANEL = 48, TILE = 6;                // columns of a panel; rows of a tile of 16: 12 sums in registers
constexpr long TOGETHER = 256;                     // tokens whose products are summed before they are added to the result
constexpr long ENOUGH = 1 << 20;                   // products that are worth another thread

// (tokens, 48 columns) of one panel, each divided by the token's length where there are lengths; zeros past the last.
void order(const bf16* x, const float* lengths, long tokens, long size, long panel, float* to) {
    for (long t = 0; t < tokens; ++t, to += PANEL)
        for (int part = 0; part < PANEL; part += 16) {
            const long column = std::min(panel * PANEL + part, size);
            Floats values = load(x + t * size + column, lanes(size - column));
            if (lengths != nullptr) values = rounded(values / all(lengths[t]));
            store(to + part, values);
        }
}

// M rows and 16 columns of the result: out = keep * out + weight * the products of all tokens.
template <int M>
void tile(const float* rows, const float* columns, long tokens, float keep, float weight, float* out, long stride, long left) {
    Floats sums[M];
    std::fill(sums, sums + M, zeros());
    for (long t = 0; t < tokens; ++t, rows += PANEL, columns += PANEL) {
        const Floats b = load(columns);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) sums[i] = fused(all(rows[i]), b, sums[i]);
    }
    const Lanes mask = lanes(left);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
        float* at = out + i * stride;
        store(at, fused(sums[i], all(weight), load(at, mask) * all(keep)), mask);
    }
}

using Tile = void (*)(const float*, const float*, long, float, float, float*, long, long);
constexpr Tile TILES[TILE + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

}  // namespace

// out (size, size) = keep * out + weight * x^T x on and above the diagonal; x (tokens, size), each token divided by its
// length, or as it is where `lengths` is null. Below the diagonal, at most 48 from it, stands what nobody should read.
extern "C" void maquette_second_moments(const bf16* x, const float* lengths, long tokens, long size, float keep,
                                        float weight, float* out, int threads) {
    const long panels = (size + PANEL - 1) / PANEL;
    std::vector<float> ordered(size_t(panels) * std::clamp(tokens, 1L, TOGETHER) * PANEL);  // a place also for no tokens
    for (long first = 0; first < std::max(tokens, 1L); first += TOGETHER) {
        const long count = std::min(TOGETHER, tokens - first), each = count * PANEL;
        const float kept = first == 0 ? keep : 1;
        const float* some = lengths == nullptr ? nullptr : lengths + first;
        const int useful = int(std::min<long>(threads, 1 + count * size * size / ENOUGH));
#pragma omp parallel num_threads(useful)
        {
#pragma omp for schedule(static)
            for (long p = 0; p < panels; ++p) order(x + first * size, some, count, size, p, &ordered[p * each]);
#pragma omp for schedule(dynamic)
            for (long i = 0; i < panels; ++i)
                for (long j = i; j < panels; ++j)
                    for (int part = 0; part < PANEL && j * PANEL + part < size; part += 16) {
                        const float* columns = &ordered[j * each + part];
                        const int last = int(std::min<long>(PANEL, size - i * PANEL));
                        for (int row = 0; row < last; row += TILE) {
                            float* at = out + (i * PANEL + row) * size + j * PANEL + part;
                            TILES[std::min(TILE, last - row)](&ordered[i * each + row], columns, count, kept, weight, at,
                                                              size, size - j * PANEL - part);
                        }
                    }
        }
    }
}
