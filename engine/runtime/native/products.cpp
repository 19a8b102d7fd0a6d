// Few rows: decoding reads every weight once for each token, so its time is the time of the bytes. The work is parted
// into blocks of 16 rows of W; what is done with one is the processor's own (`rows.h`).
#include "products.h"

#include <algorithm>
#include <vector>

#include "bytes.h"
#include "rows.h"
#ifdef __AMX_TILE__
#include "few.h"
#endif

namespace {

constexpr int TILE = 8;  // rows of x at a time; loops over them are unrolled, else g++ keeps the sums in memory

// One matrix and `M` rows of x: everything that a block of 16 rows of W needs.
struct Task {
    const Matrix* w = nullptr;
    const bf16* x = nullptr;
    bf16* out = nullptr;
    long stride = 0;  // of out
    Inputs own;
    const Inputs* inputs = nullptr;  // its own, or another task's
    Bytes bytes;
};

template <int M> void run(const Task& task, long block) {
    const Matrix& w = *task.w;
    Floats totals[M];
    switch (w.kind) {
        case Matrix::INT4: packed_block<Matrix::INT4, M>(w, block, *task.inputs, totals); break;
        case Matrix::INT8: packed_block<Matrix::INT8, M>(w, block, *task.inputs, totals); break;
        case Matrix::INT8_INT8: bytes_block<M>(w, block, task.bytes.codes.data(), task.bytes.scales.data(), totals); break;
        default: dense_block<M>(w, block, task.x, *task.inputs, totals);
    }
    const Lanes mask = lanes(w.rows - block * ROWS);
    const Floats bias = w.bias ? load(w.bias + block * ROWS, mask) : zeros();
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) store(task.out + i * task.stride + block * ROWS, totals[i] + bias, mask);
}

constexpr int STRETCH = 16 * VECTORS, SIDE_BY_SIDE = 4;  // rows of a turned W at a time, and of x: sums in registers

// M rows of x, as float32, times the rows of a turned W from `start` on.
template <int M> void run_turned(const Matrix& w, long start, const float* x, bf16* out) {
    const bf16* from = (const bf16*)w.weight + start;
    Lanes masks[VECTORS];
    Floats sums[M][VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
        masks[j] = lanes(std::max(0L, w.rows - start - 16 * j));
        for (int i = 0; i < M; ++i) sums[i][j] = w.bias ? load(w.bias + start + 16 * j, masks[j]) : zeros();
    }
    for (int k = 0; k < w.columns; ++k, from += w.rows) {
        constexpr int AHEAD = 24;  // rows: processors fetch by themselves only within a page
        for (int j = 0; j < VECTORS; j += 2) __builtin_prefetch(from + AHEAD * long(w.rows) + 16 * j);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            const Floats weights = load(from + 16 * j, masks[j]);
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) sums[i][j] = fused(weights, all(x[i * long(w.columns) + k]), sums[i][j]);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < VECTORS; ++j) store(out + i * long(w.rows) + start + 16 * j, sums[i][j], masks[j]);
}

// Sums are float32; each thread goes down stretches of W's rows, from column to column.
void multiply_turned(const Matrix& w, const bf16* x, int m, bf16* out, int most) {
    constexpr void (*RUNS[])(const Matrix&, long, const float*, bf16*) = {
        nullptr, run_turned<1>, run_turned<2>, run_turned<3>, run_turned<4>,
    };
    const long numbers = long(m) * w.columns, stretches = (w.rows + STRETCH - 1) / STRETCH;
    std::vector<float> wide(numbers);
    for (long k = 0; k < numbers; k += 16) store(&wide[k], load(x + k, lanes(numbers - k)), lanes(numbers - k));
    const int threads = int(std::min<long>(most, 1 + numbers * w.rows / ENOUGH));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long stretch = 0; stretch < stretches; ++stretch)
        for (int i = 0; i < m; i += SIDE_BY_SIDE)
            RUNS[std::min(SIDE_BY_SIDE, m - i)](
                w, stretch * STRETCH, &wide[size_t(i) * w.columns], out + long(i) * w.rows
            );
}

using Run = void (*)(const Task&, long);
constexpr Run RUNS[TILE + 1] = {nullptr, run<1>, run<2>, run<3>, run<4>, run<5>, run<6>, run<7>, run<8>};

}  // namespace

void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads) {
    if (m == 0) return;
    if (matrices->kind == Matrix::TURNED) return multiply_turned(*matrices, x, m, out, threads);
#ifdef __AMX_TILE__
    if (multiply_tile(matrices, count, x, m, out, threads)) return;
#endif
    const int tiles = (m + TILE - 1) / TILE;
    const auto first = [m, tiles](int tile) { return int(long(tile) * m / tiles); };  // row of x
    const Blocks blocks(matrices, count, m, threads);
    std::vector<Task> tasks(size_t(tiles) * count);  // (tiles of x, matrices)
#pragma omp parallel for num_threads(std::min(blocks.threads, tiles)) schedule(static)
    for (int tile = 0; tile < tiles; ++tile) {
        const int start = first(tile), rows = first(tile + 1) - start;
        Task* const here = &tasks[size_t(tile) * count];
        for (int i = 0, at = 0; i < count; at += matrices[i++].rows) {
            const Matrix& w = matrices[i];
            Task& task = here[i];
            task.w = &w, task.x = x + long(start) * w.columns;
            task.out = out + start * blocks.stride + at, task.stride = blocks.stride;
            if (w.kind == Matrix::INT8_INT8) task.bytes = encode(w, task.x, rows, 1);
            for (int j = 0; j < i && !task.inputs; ++j)
                if (same_inputs(w, matrices[j])) task.inputs = here[j].inputs;
            if (task.inputs) continue;
            if (w.kind != Matrix::INT8_INT8) task.own = arrange(w, task.x, rows);
            task.inputs = &task.own;
        }
    }
#pragma omp parallel for num_threads(blocks.threads) schedule(dynamic, blocks.turn)
    for (long unit = 0; unit < blocks.all; ++unit) {
        const auto [i, block, at] = blocks.find(unit);
        for (int tile = 0; tile < tiles; ++tile)
            RUNS[first(tile + 1) - first(tile)](tasks[size_t(tile) * count + i], block);
    }
}
