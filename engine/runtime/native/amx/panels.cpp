// Many rows: 64 rows of W at a time, and some of their columns, are unpacked into the cache as tiles read them, and
// multiplied with tiles of 16 rows of x; sums of 32 x 32 stand in tiles meanwhile.
//
// What is read again and again has to stay in the second cache: some columns of some rows of x, which meet some panels
// of W one after the other, and these panels' sums.
#include <algorithm>
#include <vector>

#include "bytes.h"
#include "tiles.h"

namespace {

constexpr long SOME = 512;   // rows of x at a time
constexpr int STRETCH = 32;  // tiles of a row at a time: of so many rows 1 MiB
constexpr int TURN = 4;      // panels at a time, whose sums are half of that
constexpr int SQUARE = 4 * SIDE;  // lines of four tiles of sums: 32 rows of x, 32 of W

// Some columns of a panel as tiles: (4 parts, steps, 16, 16) numbers of 32 bits, zeros past the last column.
void unpack(const Matrix& w, long panel, int first, int last, Order order, uint32_t* to) {
    const long used = (last - first) / (w.kind == Matrix::INT8_INT8 ? 4 : 2) * SIDE;
    for (int part = 0; part < PARTS; ++part) std::fill(to + part * order.part + used, to + (part + 1) * order.part, 0);
    if (w.kind == Matrix::INT4) unpack_panel<Matrix::INT4>(w, panel, first, last, order, to);
    if (w.kind == Matrix::INT8) unpack_panel<Matrix::INT8>(w, panel, first, last, order, to);
    if (w.kind == Matrix::INT8_INT8) order_panel(w, panel, first, last, order, to);
    Tiles::written();
}

// Add to the sums of a panel, (2, tall / 2, 2 columns of tiles, 2 rows, 16, 16), or begin them.
template <bool INTEGERS>
void multiply(const Line* x, long tall, const uint32_t* weights, Order order, int steps, bool begin, Line* sums) {
    for (int part = 0; part < PARTS; part += 2)
        for (long i = 0; i < tall; i += 2, sums += SQUARE) {
            if (begin) zero_sums();
            else load_sums(sums, sums + SIDE, sums + 2 * SIDE, sums + 3 * SIDE);
            two_by_two<INTEGERS>(x + i * steps * SIDE, steps * SIDE, weights + part * order.part, order, steps);
            store_sums(sums, sums + SIDE, sums + 2 * SIDE, sums + 3 * SIDE);
        }
}

// out (m, 64 rows of W) from the sums of a panel.
void finish(const Matrix& w, long panel, const Line* sums, long m, long tall, const float* scales, bf16* out) {
    const bool integers = w.kind == Matrix::INT8_INT8;
    __mmask16 mask[PARTS];
    __m512 bias[PARTS], scale[PARTS];
    __m512i shift[PARTS];
    for (int part = 0; part < PARTS; ++part) {
        const long row = panel * PANEL + part * SIDE;
        mask[part] = lanes(std::max(0L, w.rows - row));
        bias[part] = w.bias ? load(w.bias + row, mask[part]) : zeros();
        if (!integers) continue;
        scale[part] = load(w.scale + row, mask[part]);
        shift[part] = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask[part], w.sums + row), 7);
    }
    for (long i = 0; i < m; ++i)
        for (int part = 0; part < PARTS; ++part) {
            const Line* square = sums + (part / 2 * (tall / 2) + i / (2 * SIDE)) * SQUARE;
            const Line* from = square + part % 2 * 2 * SIDE + i % (2 * SIDE);
            __m512 sum = _mm512_load_ps(from);
            if (integers) {
                sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(from), shift[part]));
                sum = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(scales[i])), scale[part]);
            }
            store(out + i * w.rows + panel * PANEL + part * SIDE, _mm512_add_ps(sum, bias[part]), mask[part]);
        }
}

}  // namespace

void multiply_many(const Matrix& w, const bf16* inputs, long all, bf16* outputs, int threads) {
    const bool integers = w.kind == Matrix::INT8_INT8;
    const int size = integers ? 1 : 2, stretch = STRETCH * 64 / size;  // bytes of an input; columns
    threads = int(std::min(long(threads), 1 + all * w.columns * w.rows / ENOUGH));
    const long panels = upward(w.rows, PANEL);
    // Of few columns x stays anyway. Else turns are short enough for threads that are not equally fast.
    const long turn = w.columns <= stretch ? 1 : std::clamp(panels / (4L * threads), 1L, long(TURN));
    for (long start = 0; start < all; start += SOME) {
        const long m = std::min(SOME, all - start), tall = upward(m, 2 * SIDE) * 2;  // tiles, two at a time
        const bf16* rows = inputs + start * w.columns;
        const Bytes bytes = integers ? encode(w, rows, m, threads) : Bytes{};
        const void* from = integers ? (const void*)bytes.codes.data() : rows;
        const Lines x = tiles_of(from, m, long(w.columns) * size, tall, STRETCH, threads);
#pragma omp parallel num_threads(threads)
        {
            const Tiles here;
            const Lines columns(new Line[STRETCH * PARTS * SIDE]), sums(new Line[size_t(turn) * tall * PARTS * SIDE]);
            uint32_t* const weights = (uint32_t*)columns.get();
#pragma omp for schedule(dynamic)
            for (long p = 0; p < panels; p += turn) {
                const long end = std::min(panels, p + turn);
                for (int first = 0; first < w.columns; first += stretch) {
                    const int last = std::min(w.columns, first + stretch);
                    const int steps = int(upward(long(last - first) * size, 64));
                    const Order order{long(steps) * SIDE * SIDE, SIDE};
                    const Line* const tiles = &x[long(first) * size / 64 * tall * SIDE];
                    for (long panel = p; panel < end; ++panel) {
                        Line* const own = &sums[(panel - p) * tall * PARTS * SIDE];
                        unpack(w, panel, first, last, order, weights);
                        if (integers) multiply<true>(tiles, tall, weights, order, steps, first == 0, own);
                        else multiply<false>(tiles, tall, weights, order, steps, first == 0, own);
                    }
                }
                for (long panel = p; panel < end; ++panel) {
                    const Line* const own = &sums[(panel - p) * tall * PARTS * SIDE];
                    finish(w, panel, own, m, tall, bytes.scales.data(), outputs + start * w.rows);
                }
            }
        }
    }
}
