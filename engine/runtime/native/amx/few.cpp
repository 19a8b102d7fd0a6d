// Some rows of x, too many for sums in registers of vectors: one tile of them meets 16 rows of W at a time.
//
// Codes become whole bfloat16 numbers in the first cache, and a group's sums are multiplied by its scales once, as with
// vectors. What is stored row by row needs no unpacking: there the rows of W are the tile's rows, x is its columns, and
// the sums of a block are turned round at the end.
#include "few.h"

#include <vector>

#include "bytes.h"
#include "tiles.h"

namespace {

// One product and what its blocks read of x.
struct Task : Product {
    Lines lines;                // a row of tiles; row by row or, where W is stored so, turned
    std::vector<float> sums;  // (groups, 16), for zero points; nothing where there are none
    Bytes bytes;
    int like = 0;  // the task that reads x for it
};

bool packed(const Matrix& w) { return w.kind == Matrix::INT4 || w.kind == Matrix::INT8; }

void turn(Line* tile) {
    __m512i square[SIDE];
    for (int i = 0; i < SIDE; ++i) square[i] = _mm512_load_si512(tile + i);
    transpose(square);
    for (int i = 0; i < SIDE; ++i) _mm512_store_si512(tile + i, square[i]);
}

void read(Task& task) {
    const auto [matrix, x, m, out, stride] = static_cast<const Product&>(task);
    const Matrix& w = *matrix;
    const bool integers = w.kind == Matrix::INT8_INT8;
    const long bytes = long(w.columns) * (integers ? 1 : 2);
    if (integers) task.bytes = encode(w, x, m, 1);
    task.lines = tiles_of(integers ? (const void*)task.bytes.codes.data() : x, m, bytes, 1, upward(bytes, 64), 1);
    if (!packed(w))
        for (long k = 0; k < upward(bytes, 64); ++k) turn(&task.lines[k * SIDE]);
    if (w.zero) {
        task.sums.resize(size_t(w.columns / w.group) * SIDE);
        for (int i = 0; i < m; ++i)
            for (int k = 0; k < w.columns; ++k) task.sums[size_t(k / w.group) * SIDE + i] += widen(x[long(i) * w.columns + k]);
    }
}

// totals (M): the products of a row of x each with the 16 rows of W in `block`; `sums` (groups, 16) of the inputs.
template <int KIND, int M>
void packed_block(const Matrix& w, long block, const Line* x, const float* sums, Floats* out) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS;
    constexpr int SOME = 8;  // tiles at a time: what was just stored cannot be loaded yet
    const int groups = w.columns / w.group, tiles = w.columns / 32, each = w.group / 32;
    const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / STEP) * 64;
    alignas(64) __m512i weights[SOME][SIDE];
    alignas(64) float found[SIDE][SIDE] = {};  // also of rows that are not there
    Floats totals[M];
    std::fill(totals, totals + M, zeros());
    for (int tile = 0, g = 0; tile < tiles;) {
        const int last = std::min(tile + SOME, tiles);
        for (__m512i* to = weights[0]; to < weights[last - tile]; to += PAIRS, codes += 64) {
            fetch(codes);
            Codes<KIND>::unpack(codes, to);
        }
        Tiles::written();
        for (const __m512i* from = weights[0]; tile < last; from += SIDE, x += SIDE) {
            if (tile % each == 0) _tile_zero(0);
            _tile_loadd(1, x, 64);
            _tile_loadd(4, from, 64);
            _tile_dpbf16ps(0, 1, 4);
            if (++tile % each) continue;
            _tile_stored(0, found, 64);
            const __m512 scale = load(w.scale + (block * groups + g) * ROWS);
            const __m512 zero = w.zero ? load(w.zero + (block * groups + g) * ROWS) : zeros();
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                __m512 sum = _mm512_load_ps(found[i]);
                if (w.zero) sum = less_fused(sum, zero, all(sums[g * SIDE + i]));
                totals[i] = fused(sum, scale, totals[i]);
            }
            ++g;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) out[i] = totals[i];
}
template <int KIND>
void packed_block(const Matrix& w, long block, const Line* x, const float* sums, int m, Floats* totals) {
    if (m <= 4) packed_block<KIND, 4>(w, block, x, sums, totals);
    else if (m <= 8) packed_block<KIND, 8>(w, block, x, sums, totals);
    else packed_block<KIND, 16>(w, block, x, sums, totals);
}

// The same for what is stored row by row: sums (m), whole numbers or float32.
template <bool INTEGERS> void plain_block(const Matrix& w, long block, const Line* x, __m512i* sums) {
    const long bytes = long(w.columns) * (INTEGERS ? 1 : 2), tiles = upward(bytes, 64);
    const uint8_t* from = (const uint8_t*)w.weight + block * ROWS * bytes;
    const long rows = std::min<long>(ROWS, w.rows - block * ROWS), whole = rows == ROWS ? bytes / 64 : 0;
    alignas(64) __m512i rest[SIDE];
    _tile_zero(5);
    for (long k = 0; k < tiles; ++k, x += SIDE) {
        if (k < whole) {
            _tile_loadd(6, from + k * 64, bytes);
        } else {  // past the end there is nothing that may be read
            const long left = std::min(64L, bytes - k * 64);
            const __mmask64 mask = left == 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
            for (int r = 0; r < SIDE; ++r)
                rest[r] = r < rows ? _mm512_maskz_loadu_epi8(mask, from + r * bytes + k * 64) : _mm512_setzero_si512();
            Tiles::written();
            _tile_loadd(6, rest, 64);
        }
        _tile_loadd(7, x, 64);
        if constexpr (INTEGERS) _tile_dpbsud(5, 6, 7);
        else _tile_dpbf16ps(5, 6, 7);
    }
    _tile_stored(5, sums, 64);
    transpose(sums);
}

void run(const Task& task, const Task& inputs, long block) {
    const auto [matrix, x, m, out, stride] = static_cast<const Product&>(task);
    const Matrix& w = *matrix;
    const __mmask16 mask = lanes(w.rows - block * ROWS);
    Floats totals[SIDE];
    alignas(64) __m512i sums[SIDE];
    if (w.kind == Matrix::INT4) packed_block<Matrix::INT4>(w, block, inputs.lines.get(), inputs.sums.data(), m, totals);
    if (w.kind == Matrix::INT8) packed_block<Matrix::INT8>(w, block, inputs.lines.get(), inputs.sums.data(), m, totals);
    if (w.kind == Matrix::DENSE) {
        plain_block<false>(w, block, inputs.lines.get(), sums);
        for (int i = 0; i < m; ++i) totals[i] = _mm512_castsi512_ps(sums[i]);
    }
    if (w.kind == Matrix::INT8_INT8) {
        plain_block<true>(w, block, inputs.lines.get(), sums);
        const __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, w.sums + block * ROWS), 7);
        const __m512 scale = load(w.scale + block * ROWS, mask);
        for (int i = 0; i < m; ++i)
            totals[i] = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i], shift)) * all(task.bytes.scales[i]) * scale;
    }
    const Floats bias = w.bias ? load(w.bias + block * ROWS, mask) : zeros();
    for (int i = 0; i < m; ++i) store(out + i * stride + block * ROWS, totals[i] + bias, mask);
}

}  // namespace

bool fits_tile(const Product& product) {
    return product.m >= FEWEST && product.m <= SIDE && !(packed(*product.w) && product.w->group % 32);
}

void multiply_tiles(const Product* products, int count, int threads) {
    const Blocks blocks(products, count, threads);
    std::vector<Task> tasks(count);
    std::vector<int> own;  // tasks that read x themselves
    int most = 0;
    for (int i = 0; i < count; ++i) {
        Task& task = tasks[i];
        static_cast<Product&>(task) = products[i];
        most = std::max(most, task.m);
        task.like = like(products, i);
        if (task.like == i) own.push_back(i);
    }
    side_by_side(int(own.size()), blocks.threads, [&](int i) { read(tasks[own[i]]); });
    const long all = blocks.ends.back();
#pragma omp parallel num_threads(blocks.threads)
    {
        const Tiles here(most);
#pragma omp for schedule(dynamic, blocks.turn)
        for (long unit = 0; unit < all; ++unit) {
            const auto [i, block] = blocks.find(unit);
            const Task& task = tasks[i];
            run(task, tasks[task.like], block);
        }
    }
}
