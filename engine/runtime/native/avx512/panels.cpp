// Many rows: 64 rows of W at a time are unpacked into the cache, in the order in which the processor's dot products
// read them, and multiplied with 6 rows of x at a time in registers.
#include <algorithm>
#include <vector>

#include "bytes.h"
#include "rows.h"

namespace {

// 64 rows of W in bfloat16, ordered (columns / 2, 64 rows, 2 columns).
template <int KIND> void unpack_panel(const Matrix& w, long panel, uint32_t* to) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS;
    const int groups = w.columns / w.group;
    for (int part = 0; part < 4; ++part) {
        const long block = panel * 4 + part;
        if (block >= blocks(w)) {
            for (int k = 0; k < w.columns / 2; ++k) _mm512_storeu_si512(to + k * 64 + part * 16, _mm512_setzero_si512());
            continue;
        }
        const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / STEP) * 64;
        uint32_t* at = to + part * 16;
        for (int g = 0; g < groups; ++g) {
            const __m512 scale = load(w.scale + (block * groups + g) * ROWS);
            const __m512 zero = w.zero ? load(w.zero + (block * groups + g) * ROWS) : _mm512_setzero_ps();
            for (int c = 0; c < w.group / STEP; ++c, codes += 64) {
                __m512i pairs[PAIRS];
                Codes<KIND>::unpack(codes, pairs);
                for (int j = 0; j < PAIRS; ++j, at += 64) {
                    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[j], 16));
                    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs[j], _mm512_set1_epi32(int(0xffff0000))));
                    even = _mm512_mul_ps(_mm512_sub_ps(even, zero), scale);
                    odd = _mm512_mul_ps(_mm512_sub_ps(odd, zero), scale);
                    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
                    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
                    _mm512_storeu_si512(at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                }
            }
        }
    }
}

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

// 64 rows of INT8_INT8 codes, ordered (columns / 4, 64 rows, 4 columns); past the last row it repeats.
void order_panel(const Matrix& w, long panel, int32_t* to) {
    for (int part = 0; part < 4; ++part) {
        alignas(64) int32_t starts[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            const long row = std::min<long>(panel * 64 + part * ROWS + r, w.rows - 1);
            starts[r] = int32_t((row - std::min<long>(panel * 64, w.rows - 1)) * w.columns);
        }
        const __m512i index = _mm512_load_si512(starts);
        const int8_t* from = (const int8_t*)w.weight + std::min<long>(panel * 64, w.rows - 1) * w.columns;
        for (int k = 0; k < w.columns / 4; ++k)
            _mm512_storeu_si512(to + k * 64 + part * ROWS, _mm512_i32gather_epi32(index, from + k * 4, 1));
    }
}

// As `panel_product`, in integers; `first` is the number of the first row of x.
template <int M> void bytes_panel_product(const Matrix& w, long panel, const int32_t* weights, const Bytes& in, long first,
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

using BytesPanelProduct = void (*)(const Matrix&, long, const int32_t*, const Bytes&, long, bf16*);
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
        std::vector<uint32_t> panel(size_t(w.columns) / 2 * 64);
        int32_t* ordered = (int32_t*)panel.data();
#pragma omp for schedule(static)
        for (long p = 0; p < panels; ++p) {
            if (w.kind == Matrix::INT4) unpack_panel<Matrix::INT4>(w, p, panel.data());
            if (w.kind == Matrix::INT8) unpack_panel<Matrix::INT8>(w, p, panel.data());
            if (w.kind == Matrix::INT8_INT8) order_panel(w, p, ordered);
            for (long start = 0; start < m; start += PANEL_TILE) {
                const int rows = int(std::min<long>(PANEL_TILE, m - start));
                bf16* to = out + start * w.rows;
                if (w.kind == Matrix::INT8_INT8) BYTES_PANELS[rows](w, p, ordered, bytes, start, to);
                else PANELS[rows](w, p, panel.data(), x + start * w.columns, to);
            }
        }
    }
}
