// Many rows. Packed weights have no other way for them than for few; of INT8_INT8 16 rows at a time are put in order in
// the cache and multiplied with 6 rows of x at a time in registers.
#include <algorithm>
#include <vector>

#include "bytes.h"
#include "rows.h"

namespace {

constexpr int TILE = 6;         // times 2 sums, 2 weights and an input: 15 of 16 registers
constexpr long TOGETHER = 256;  // rows of x that are arranged at once

// 16 rows of INT8_INT8 codes in sixteen bits, (columns / 2, 16 rows, 2 columns); past the last row it repeats.
void order_panel(const Matrix& w, long block, int16_t* to) {
    for (int r = 0; r < ROWS; ++r) {
        const int8_t* from = (const int8_t*)w.weight + std::min<long>(block * ROWS + r, w.rows - 1) * w.columns;
        for (int k = 0; k < w.columns; k += 2)
            for (int p = 0; p < 2; ++p) to[k * ROWS + 2 * r + p] = from[k + p];
    }
}

// out (M, 16) = M rows of x, from the one with the number `first`, times an ordered panel.
template <int M>
void panel_product(const Matrix& w, long block, const int16_t* weights, const Bytes& in, long first, bf16* out) {
    __m256i sums[M][2];
    for (auto& row : sums) std::fill(row, row + 2, _mm256_setzero_si256());
    const long half = w.columns / 2;
    const int32_t* pairs = (const int32_t*)in.codes.data() + first * half;
    for (long k = 0; k < half; ++k, weights += 2 * ROWS) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)weights);
        const __m256i high = _mm256_loadu_si256((const __m256i*)(weights + ROWS));
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            const __m256i a = _mm256_set1_epi32(pairs[i * half + k]);
            add_pairs(sums[i][0], a, low);
            add_pairs(sums[i][1], a, high);
        }
    }
    const Lanes mask = lanes(w.rows - block * ROWS);
    const Floats scale = load(w.scale + block * ROWS, mask), bias = w.bias ? load(w.bias + block * ROWS, mask) : zeros();
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
        const Floats sum{_mm256_cvtepi32_ps(sums[i][0]), _mm256_cvtepi32_ps(sums[i][1])};
        store(out + i * long(w.rows) + block * ROWS, sum * all(in.scales[first + i]) * scale + bias, mask);
    }
}

using Product = void (*)(const Matrix&, long, const int16_t*, const Bytes&, long, bf16*);
constexpr Product PRODUCTS[TILE + 1] = {nullptr,          panel_product<1>, panel_product<2>, panel_product<3>,
                                        panel_product<4>, panel_product<5>, panel_product<6>};

void multiply_bytes(const Matrix& w, const bf16* x, long m, bf16* out, int threads) {
    const Bytes in = encode(w, x, m, threads);
#pragma omp parallel num_threads(threads)
    {
        std::vector<int16_t> panel(size_t(w.columns) * ROWS);
#pragma omp for schedule(static)
        for (long block = 0; block < blocks(w); ++block) {
            order_panel(w, block, panel.data());
            for (long start = 0; start < m; start += TILE)
                PRODUCTS[std::min<long>(TILE, m - start)](w, block, panel.data(), in, start, out + start * w.rows);
        }
    }
}

}  // namespace

void multiply_many(const Matrix& w, const bf16* x, long m, bf16* out, int threads) {
    for (long start = 0; start < m; start += TOGETHER) {
        const long rows = std::min(TOGETHER, m - start);
        const int useful = int(std::min(long(threads), 1 + rows * w.columns * w.rows / (1 << 20)));
        const bf16* from = x + start * w.columns;
        if (w.kind == Matrix::INT8_INT8) multiply_bytes(w, from, rows, out + start * w.rows, useful);
        else multiply(&w, 1, from, int(rows), out + start * w.rows, useful);
    }
}
