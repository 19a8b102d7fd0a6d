// Many rows: 16 rows of W at a time are unpacked into the cache and multiplied with 6 rows of x at a time in registers.
#include <algorithm>
#include <vector>

#include "bytes.h"
#include "rows.h"

namespace {

constexpr int TILE = 6;         // times 2 sums, 2 weights and an input: 15 of 16 registers
constexpr long TOGETHER = 240;  // rows of x that are widened at once

// The T-th column and those after it of a half block, in float32.
template <int KIND, int T = 0> void unpack_columns(__m256i codes, __m256 zero, __m256 scale, float* to) {
    using Kind = Codes<KIND>;
    const __m256 number = Kind::template number<T>(codes) * _mm256_set1_ps(Kind::factor(T));
    _mm256_storeu_ps(to + Kind::column(T) * ROWS, (number - zero) * scale);
    if constexpr (T + 1 < Kind::COLUMNS) unpack_columns<KIND, T + 1>(codes, zero, scale, to);
}

// 16 rows of W in float32, (columns, 16 rows).
template <int KIND> void unpack_panel(const Matrix& w, long block, float* to) {
    using Kind = Codes<KIND>;
    const int groups = w.columns / w.group, steps = w.group / Kind::COLUMNS;
    for (int g = 0; g < groups; ++g)
        for (int half = 0; half < 2; ++half) {
            const long at = (block * groups + g) * ROWS + half * 8;
            const __m256 scale = widened(_mm_loadu_si128((const __m128i*)(w.scale + at)));
            __m256 zero = _mm256_set1_ps(Kind::OFFSET);
            if (w.zero) zero = zero + load_eight(w.zero + at);
            for (int c = g * steps; c < (g + 1) * steps; ++c) {
                const uint8_t* codes =
                    (const uint8_t*)w.weight + (block * groups * steps + c) * BYTES<KIND> + half * Kind::HALF;
                unpack_columns<KIND>(Kind::read(codes), zero, scale, to + long(c) * Kind::COLUMNS * ROWS + half * 8);
            }
        }
}

// 16 rows of INT8_INT8 codes in sixteen bits, (columns / 2, 16 rows, 2 columns); past the last row it repeats.
void order_panel(const Matrix& w, long block, int16_t* to) {
    for (int r = 0; r < ROWS; ++r) {
        const int8_t* from = (const int8_t*)w.weight + std::min<long>(block * ROWS + r, w.rows - 1) * w.columns;
        for (int k = 0; k < w.columns; k += 2)
            for (int p = 0; p < 2; ++p) to[k * ROWS + 2 * r + p] = from[k + p];
    }
}

// out (M, 16) = M rows of x (M, columns) times an unpacked panel.
template <int M> void panel_product(const Matrix& w, long block, const float* weights, const float* x, bf16* out) {
    Floats sums[M];
    std::fill(sums, sums + M, zeros());
    for (long k = 0; k < w.columns; ++k, weights += ROWS) {
        const Floats b = load(weights);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) sums[i] = fused(all(x[i * long(w.columns) + k]), b, sums[i]);
    }
    const Lanes mask = lanes(w.rows - block * ROWS);
    const Floats bias = w.bias ? load(w.bias + block * ROWS, mask) : zeros();
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) store(out + i * long(w.rows) + block * ROWS, sums[i] + bias, mask);
}

// As `panel_product`, in integers; `first` is the number of the first row of x.
template <int M>
void bytes_panel_product(const Matrix& w, long block, const int16_t* weights, const Bytes& in, long first, bf16* out) {
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
            sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(a, low));
            sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(a, high));
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

using PanelProduct = void (*)(const Matrix&, long, const float*, const float*, bf16*);
constexpr PanelProduct PANELS[TILE + 1] = {nullptr, panel_product<1>, panel_product<2>, panel_product<3>,
                                           panel_product<4>, panel_product<5>, panel_product<6>};
using BytesPanelProduct = void (*)(const Matrix&, long, const int16_t*, const Bytes&, long, bf16*);
constexpr BytesPanelProduct BYTES_PANELS[TILE + 1] = {
    nullptr, bytes_panel_product<1>, bytes_panel_product<2>, bytes_panel_product<3>,
    bytes_panel_product<4>, bytes_panel_product<5>, bytes_panel_product<6>};

// As `multiply_many`, for at most TOGETHER rows.
void multiply_some(const Matrix& w, const bf16* x, long m, bf16* out, int threads) {
    const bool bytes = w.kind == Matrix::INT8_INT8;
    const Bytes in = bytes ? encode(w, x, m, threads) : Bytes{};
    std::vector<float> wide(bytes ? 0 : size_t(m) * w.columns);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> panel(size_t(w.columns) * ROWS);  // of INT8_INT8 half of it
        int16_t* ordered = (int16_t*)panel.data();
#pragma omp for schedule(static)
        for (long k = 0; k < long(wide.size()); ++k) wide[k] = widen(x[k]);
#pragma omp for schedule(static)
        for (long block = 0; block < blocks(w); ++block) {
            if (w.kind == Matrix::INT4) unpack_panel<Matrix::INT4>(w, block, panel.data());
            if (w.kind == Matrix::INT8) unpack_panel<Matrix::INT8>(w, block, panel.data());
            if (bytes) order_panel(w, block, ordered);
            for (long start = 0; start < m; start += TILE) {
                const int rows = int(std::min<long>(TILE, m - start));
                bf16* to = out + start * w.rows;
                if (bytes) BYTES_PANELS[rows](w, block, ordered, in, start, to);
                else PANELS[rows](w, block, panel.data(), wide.data() + start * w.columns, to);
            }
        }
    }
}

}  // namespace

void multiply_many(const Matrix& w, const bf16* x, long m, bf16* out, int threads) {
    for (long start = 0; start < m; start += TOGETHER) {
        const long rows = std::min(TOGETHER, m - start);
        const int useful = int(std::min(long(threads), 1 + rows * w.columns * w.rows / (1 << 20)));
        multiply_some(w, x + start * w.columns, rows, out + start * w.rows, useful);
    }
}
