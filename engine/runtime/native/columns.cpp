// Columns of a weight solved one after another on a grid, as GPTQ does: each is rounded to the nearest level once it
// makes up for what the columns before it missed. Rows know nothing of each other: 64 at a time go through all columns.
#include <algorithm>
#include <vector>

#include "vectors.h"

// One slice of columns; mirrored by the arguments of `maquette_solve_columns`. Arrays (columns, rows) unless said.
struct Slice {
    const float* wanted;
    const float* part;      // what each column counts as before any of the slice is solved
    const float* factor;    // (columns, columns): row j is what the errors of columns before j do to it
    const float* scale;     // (groups, rows)
    const float* zero;      // (groups, rows)
    const int64_t* groups;  // of each column
    int columns;
    long rows;
    float top;
    uint8_t* codes;
    float* missed;
};

namespace {

constexpr int LANES = 16 * VECTORS, TOGETHER = 4;  // rows, and columns, in registers at a time
constexpr long ENOUGH = 1 << 16;                   // products that are worth another thread

// J columns from `first` on, for the rows from `row` on; `before` (columns, LANES) is what was missed so far.
template <int J> void solve(const Slice& s, int first, long row, float* before) {
    Floats sums[J][VECTORS];
    Lanes masks[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) masks[v] = lanes(std::max(0L, s.rows - row - 16 * v));
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[j][v] = load(s.part + (first + j) * s.rows + row + 16 * v, masks[v]);
    const float* factor = s.factor + long(first) * s.columns;
    for (int k = 0; k < first; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Floats error = load(before + k * LANES + 16 * v);
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) sums[j][v] = fused(error, all(factor[long(j) * s.columns + k]), sums[j][v]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
        const long at = (first + j) * s.rows + row, group = s.groups[first + j] * s.rows + row;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const Lanes mask = masks[v];
            const Floats scale = load(s.scale + group + 16 * v, mask), zero = load(s.zero + group + 16 * v, mask);
            const Floats code = smaller(larger(nearest(sums[j][v] / scale) + zero, zeros()), all(s.top));
            const Floats error = load(s.wanted + at + 16 * v, mask) - (code - zero) * scale;
            store(s.codes + at + 16 * v, code, mask);
            store(s.missed + at + 16 * v, error, mask);
            store(before + (first + j) * LANES + 16 * v, error);
#pragma GCC unroll 4
            for (int next = j + 1; next < J; ++next)
                sums[next][v] = fused(error, all(factor[long(next) * s.columns + first + j]), sums[next][v]);
        }
    }
}

using Solve = void (*)(const Slice&, int, long, float*);
constexpr Solve SOLVES[TOGETHER + 1] = {nullptr, solve<1>, solve<2>, solve<3>, solve<4>};

}  // namespace

extern "C" void maquette_solve_columns(const float* wanted, const float* part, const float* factor, const float* scale,
                                       const float* zero, const int64_t* groups, int columns, long rows, float top,
                                       uint8_t* codes, float* missed, int threads) {
    const Slice slice{wanted, part, factor, scale, zero, groups, columns, rows, top, codes, missed};
    threads = int(std::min<long>(threads, 1 + rows * columns * columns / ENOUGH));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> before(size_t(columns) * LANES);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row += LANES)
            for (int first = 0; first < columns; first += TOGETHER)
                SOLVES[std::min(TOGETHER, columns - first)](slice, first, row, before.data());
    }
}
