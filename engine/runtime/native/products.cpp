// Few rows: decoding reads every weight once for each token, so its time is the time of the bytes. The work is parted
// into blocks of 16 rows of W; what is done with one is the processor's own (`rows.h`).
#include "products.h"

#include <algorithm>
#include <vector>

#include "bytes.h"
#include "rows.h"

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

// Whether both read x in the same order.
bool same_inputs(const Matrix& a, const Matrix& b) {
    return a.kind == b.kind && a.group == b.group && !a.zero == !b.zero;
}

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

using Run = void (*)(const Task&, long);
constexpr Run RUNS[TILE + 1] = {nullptr, run<1>, run<2>, run<3>, run<4>, run<5>, run<6>, run<7>, run<8>};

}  // namespace

void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads) {
    if (m == 0) return;
    const int tiles = (m + TILE - 1) / TILE;
    const auto first = [m, tiles](int tile) { return int(long(tile) * m / tiles); };  // row of x
    long stride = 0, all = 0;
    for (int i = 0; i < count; ++i) stride += matrices[i].rows, all += blocks(matrices[i]);
    threads = int(std::min<long>(threads, 1 + m * stride * matrices[0].columns / ENOUGH));
    std::vector<Task> tasks(size_t(tiles) * count);  // (tiles of x, matrices)
#pragma omp parallel for num_threads(std::min(threads, tiles)) schedule(static)
    for (int tile = 0; tile < tiles; ++tile) {
        const int start = first(tile), rows = first(tile + 1) - start;
        Task* const here = &tasks[size_t(tile) * count];
        for (int i = 0, at = 0; i < count; at += matrices[i++].rows) {
            const Matrix& w = matrices[i];
            Task& task = here[i];
            task.w = &w, task.x = x + long(start) * w.columns;
            task.out = out + start * stride + at, task.stride = stride;
            if (w.kind == Matrix::INT8_INT8) task.bytes = encode(w, task.x, rows, 1);
            for (int j = 0; j < i && !task.inputs; ++j)
                if (same_inputs(w, matrices[j])) task.inputs = here[j].inputs;
            if (task.inputs) continue;
            if (w.kind != Matrix::INT8_INT8) task.own = arrange(w, task.x, rows);
            task.inputs = &task.own;
        }
    }
    // By turns: cores are not equally fast, and not always there.
#pragma omp parallel for num_threads(threads) schedule(dynamic, std::max(1L, all / (threads * 16L)))
    for (long unit = 0; unit < all; ++unit) {
        long block = unit;
        int i = 0;
        while (block >= blocks(matrices[i])) block -= blocks(matrices[i++]);
        for (int tile = 0; tile < tiles; ++tile)
            RUNS[first(tile + 1) - first(tile)](tasks[size_t(tile) * count + i], block);
    }
}
