// Few rows: decoding reads every weight once for each token, so its time is the time of the bytes. The work is parted
// into blocks of 16 rows of W; what is done with one is the processor's own (`rows.h`).
#include "products.h"

#include <algorithm>
#include <array>
#include <vector>

#include "bytes.h"
#include "rows.h"

namespace {

constexpr int TILE = 8;  // rows of x at a time; loops over them are unrolled, else g++ keeps the sums in memory

// (groups, m): the sum of each group of each row, for zero points; nothing where nobody wants them.
std::vector<float> group_sums(const Matrix& w, const bf16* x, int m) {
    if ((w.kind != Matrix::INT4 && w.kind != Matrix::INT8) || !wants_sums(w)) return {};
    std::vector<float> sums(size_t(w.columns / w.group) * m);
    for (int i = 0; i < m; ++i)
        for (int k = 0; k < w.columns; ++k) sums[size_t(k / w.group) * m + i] += widen(x[long(i) * w.columns + k]);
    return sums;
}

// One matrix and `M` rows of x: everything that a block of 16 rows of W needs.
struct Task {
    const Matrix* w;
    const bf16* x;
    bf16* out;
    long stride;  // of out
    const Arranged* arranged;
    std::vector<float> sums;
    Bytes bytes;
};

template <int M> void run(const Task& task, long block) {
    const Matrix& w = *task.w;
    Floats totals[M];
    switch (w.kind) {
        case Matrix::INT4: packed_block<Matrix::INT4, M>(w, block, task.arranged, task.sums.data(), totals); break;
        case Matrix::INT8: packed_block<Matrix::INT8, M>(w, block, task.arranged, task.sums.data(), totals); break;
        case Matrix::INT8_INT8: bytes_block<M>(w, block, task.bytes.codes.data(), task.bytes.scales.data(), totals); break;
        default: dense_block<M>(w, block, task.x, task.arranged, totals);
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
    std::vector<Task> tasks;  // (tiles of x, matrices)
    const int tiles = (m + TILE - 1) / TILE;
    long stride = 0, all = 0;
    for (int i = 0; i < count; ++i) stride += matrices[i].rows, all += blocks(matrices[i]);
    std::vector<std::array<std::vector<Arranged>, 3>> arranged(tiles);  // shared by all matrices of a kind
    for (int tile = 0, start = 0; tile < tiles; ++tile) {
        const int rows = (m - start + tiles - tile - 1) / (tiles - tile);
        const bf16* from = x + long(start) * matrices[0].columns;
        bf16* at = out + start * stride;
        for (int i = 0; i < count; ++i) {
            const Matrix& w = matrices[i];
            const bool bytes = w.kind == Matrix::INT8_INT8;
            std::vector<Arranged>& shared = arranged[tile][bytes ? 0 : w.kind];
            if (!bytes && shared.empty()) shared = arrange(w, from, rows);
            tasks.push_back({&w, from, at, stride, shared.data(), group_sums(w, from, rows),
                             bytes ? encode(w, from, rows, 1) : Bytes{}});
            at += w.rows;
        }
        start += rows;
    }
    threads = int(std::min<long>(threads, 1 + m * stride * matrices[0].columns / ENOUGH));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long unit = 0; unit < all; ++unit) {
        long block = unit;
        int i = 0;
        while (block >= blocks(matrices[i])) block -= blocks(matrices[i++]);
        for (int tile = 0, start = 0; tile < tiles; ++tile) {
            const int rows = (m - start + tiles - tile - 1) / (tiles - tile);
            RUNS[rows](tasks[tile * count + i], block);
            start += rows;
        }
    }
}
