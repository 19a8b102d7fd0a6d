// Many rows: 64 rows of W at a time, and some of their columns, are unpacked into the cache as tiles read them, and
// multiplied with tiles of 16 rows of x; sums of 32 x 32 stand in tiles meanwhile.
#include <algorithm>
#include <vector>

#include "bytes.h"
#include "tiles.h"

namespace {

constexpr long SOME = 1024;       // rows of x at a time
constexpr int STRETCH = 1 << 11;  // bytes of a row of x at a time: the panel of W that they meet stays in the cache

// out (m, 16 rows of W) from sums (m / 16 tiles that are 64 x 16 numbers apart, 16, 16).
void finish(const Matrix& w, long row, const Line* sums, long m, const float* scales, bf16* out) {
    const __mmask16 mask = lanes(std::max(0L, w.rows - row));
    if (!mask) return;
    const __m512 bias = w.bias ? load(w.bias + row, mask) : zeros();
    const bool integers = w.kind == Matrix::INT8_INT8;
    const __m512 scale = integers ? load(w.scale + row, mask) : zeros();
    const __m512i shift = integers ? _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, w.sums + row), 7) : __m512i{};
    for (long i = 0; i < m; ++i) {
        const void* from = sums + (i / SIDE) * SIDE * PARTS + i % SIDE;
        __m512 sum = _mm512_load_ps(from);
        if (integers) {
            sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(from), shift));
            sum = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(scales[i])), scale);
        }
        store(out + i * w.rows + row, _mm512_add_ps(sum, bias), mask);
    }
}

}  // namespace

void multiply_many(const Matrix& w, const bf16* inputs, long all, bf16* outputs, int threads) {
    const bool integers = w.kind == Matrix::INT8_INT8;
    const int size = integers ? 1 : 2, stretch = STRETCH / size;  // bytes of an input; columns
    threads = int(std::min(long(threads), 1 + all * w.columns * w.rows / ENOUGH));
    for (long start = 0; start < all; start += SOME) {
        const long m = std::min(SOME, all - start), tall = upward(m, 2 * SIDE) * 2;  // tiles, two at a time
        const bf16* rows = inputs + start * w.columns;
        const Bytes bytes = integers ? encode(w, rows, m, threads) : Bytes{};
        const void* from = integers ? (const void*)bytes.codes.data() : rows;
        const Lines x = tiles_of(from, m, long(w.columns) * size, tall, threads);
        const long across = upward(long(w.columns) * size, 64) * SIDE;  // lines of a row of tiles
#pragma omp parallel num_threads(threads)
        {
            const Tiles here;
            const Lines panel(new Line[STRETCH / 4 * PARTS]), sums(new Line[size_t(tall) * PARTS * SIDE]);
#pragma omp for schedule(dynamic)
            for (long p = 0; p < upward(w.rows, PANEL); ++p) {
                for (int first = 0; first < w.columns; first += stretch) {
                    const int last = std::min(w.columns, first + stretch);
                    uint32_t* const to = (uint32_t*)panel.get();
                    const int steps = int(upward(long(last - first) * size, 64));
                    std::fill(to + (long(last - first) * size / 4) * PANEL, to + long(steps) * SIDE * PANEL, 0);
                    if (w.kind == Matrix::INT4) unpack_panel<Matrix::INT4>(w, p, first, last, to);
                    if (w.kind == Matrix::INT8) unpack_panel<Matrix::INT8>(w, p, first, last, to);
                    if (integers) order_panel(w, p, first, last, to);
                    Tiles::written();
                    for (long i = 0; i < tall; i += 2)
                        for (int part = 0; part < PARTS; part += 2) {
                            Line* const at = &sums[(i * PARTS + part) * SIDE];
                            Line* const below = at + PARTS * SIDE;
                            if (first) load_sums(at, below, at + SIDE, below + SIDE);
                            else zero_sums();
                            const Line* const lines = &x[i * across + long(first) * size / 64 * SIDE];
                            if (integers) two_by_two<true>(lines, across, to + part * SIDE, steps);
                            else two_by_two<false>(lines, across, to + part * SIDE, steps);
                            store_sums(at, below, at + SIDE, below + SIDE);
                        }
                }
                for (int part = 0; part < PARTS; ++part)
                    finish(w, p * PANEL + part * SIDE, &sums[part * SIDE], m, bytes.scales.data(), outputs + start * w.rows);
            }
        }
    }
}
