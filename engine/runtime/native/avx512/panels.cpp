// Many rows: 64 rows of W at a time are unpacked into the cache, in the order in which the processor's dot products
// read them, and multiplied with 6 rows of x at a time in registers.
#include <algorithm>
#include <vector>

#include "bytes.h"
#include "unpack.h"

namespace {

// out (M, 64) = M rows of x times an unpacked panel.
template <int M> void panel_product(const Matrix& w, long panel, const uint32_t* weights, const bf16* x, bf16* out) {
    __m512 sums[M][4];
    for (auto& row : sums) std::fill(row, row + 4, _mm512_setzero_ps());
    for (long k = 0; k < w.columns; k += 2, weights += 64) {
        __m512i b[4];
        for (int part = 0; part < 4; ++part) b[part] = _mm512_loadu_si512(weights + part * 16);
        for (int i = 0; i < M; ++i) {
            const __m512i a = _mm512_set1_epi32(int(pair(x + long(i) * w.columns + k)));
            for (int part = 0; part < 4; ++part) sums[i][part] = dot(sums[i][part], b[part], a);
        }
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {  // no `break`: with it g++ would keep all sums in memory
        const long row = std::min<long>(panel * 64 + part * ROWS, w.rows);
        const __mmask16 mask = lanes(w.rows - row);
        const __m512 bias = w.bias ? load(w.bias + row, mask) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) store(out + long(i) * w.rows + row, _mm512_add_ps(sums[i][part], bias), mask);
    }
}

using PanelProduct = void (*)(const Matrix&, long, const uint32_t*, const bf16*, bf16*);
constexpr int PANEL_TILE = 6;  // times 4 sums, 4 weights and an input: 29 of 32 registers
constexpr PanelProduct PANELS[PANEL_TILE + 1] = {
    nullptr, panel_product<1>, panel_product<2>, panel_product<3>, panel_product<4>, panel_product<5>, panel_product<6>};

// As `panel_product`, in integers; `first` is the number of the first row of x.
template <int M> void bytes_panel_product(const Matrix& w, long panel, const uint32_t* weights, const Bytes& in, long first,
                                          bf16* out) {
    __m512i sums[M][4];
    for (auto& row : sums) std::fill(row, row + 4, _mm512_setzero_si512());
    const long quarter = w.columns / 4;
    const int32_t* codes = (const int32_t*)in.codes.data() + first * quarter;
    for (long k = 0; k < quarter; ++k, weights += 64) {
        __m512i b[4];
        for (int part = 0; part < 4; ++part) b[part] = _mm512_loadu_si512(weights + part * ROWS);
        for (int i = 0; i < M; ++i) {
            const __m512i a = _mm512_set1_epi32(codes[i * quarter + k]);
            for (int part = 0; part < 4; ++part) sums[i][part] = _mm512_dpbusd_epi32(sums[i][part], a, b[part]);
        }
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {  // no `break`: with it g++ would keep all sums in memory
        const long row = std::min<long>(panel * 64 + part * ROWS, w.rows);
        const __mmask16 mask = lanes(w.rows - row);
        const __m512 scale = load(w.scale + row, mask), bias = w.bias ? load(w.bias + row, mask) : _mm512_setzero_ps();
        const __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, w.sums + row), 7);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][part], shift));
            const __m512 y = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(in.scales[first + i])), scale);
            store(out + long(i) * w.rows + row, _mm512_add_ps(y, bias), mask);
        }
    }
}

using BytesPanelProduct = void (*)(const Matrix&, long, const uint32_t*, const Bytes&, long, bf16*);
constexpr BytesPanelProduct BYTES_PANELS[PANEL_TILE + 1] = {
    nullptr, bytes_panel_product<1>, bytes_panel_product<2>, bytes_panel_product<3>,
    bytes_panel_product<4>, bytes_panel_product<5>, bytes_panel_product<6>};

}  // namespace

void multiply_many(const Matrix& w, const bf16* x, long m, bf16* out, int threads) {
    const long panels = (w.rows + 63) / 64;
    threads = int(std::min(long(threads), 1 + m * w.columns * w.rows / ENOUGH));
    const Bytes bytes = w.kind == Matrix::INT8_INT8 ? encode(w, x, m, threads) : Bytes{};
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> panel(size_t(w.columns) / 2 * PANEL);
#pragma omp for schedule(static)
        for (long p = 0; p < panels; ++p) {
            if (w.kind == Matrix::INT4) unpack_panel<Matrix::INT4>(w, p, 0, w.columns, BY_COLUMNS, panel.data());
            if (w.kind == Matrix::INT8) unpack_panel<Matrix::INT8>(w, p, 0, w.columns, BY_COLUMNS, panel.data());
            if (w.kind == Matrix::INT8_INT8) order_panel(w, p, 0, w.columns, BY_COLUMNS, panel.data());
            for (long start = 0; start < m; start += PANEL_TILE) {
                const int rows = int(std::min<long>(PANEL_TILE, m - start));
                bf16* to = out + start * w.rows;
                if (w.kind == Matrix::INT8_INT8) BYTES_PANELS[rows](w, p, panel.data(), bytes, start, to);
                else PANELS[rows](w, p, panel.data(), x + start * w.columns, to);
            }
        }
    }
}
