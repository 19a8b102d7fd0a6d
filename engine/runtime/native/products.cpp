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
struct Task : Product {
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
template <int M> void run_turned(const Matrix& w, long start, const float* x, bf16* out, long stride) {
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
        for (int j = 0; j < VECTORS; ++j) store(out + i * stride + start + 16 * j, sums[i][j], masks[j]);
}

// Sums are float32; each thread goes down stretches of W's rows, from column to column.
void multiply_turned(const Product& product, int most) {
    const auto& [matrix, x, m, out, stride] = product;
    const Matrix& w = *matrix;
    constexpr void (*RUNS[])(const Matrix&, long, const float*, bf16*, long) = {
        nullptr, run_turned<1>, run_turned<2>, run_turned<3>, run_turned<4>,
    };
    const long numbers = long(m) * w.columns, stretches = (w.rows + STRETCH - 1) / STRETCH;
    std::vector<float> wide(numbers);
    for (long k = 0; k < numbers; k += 16) store(&wide[k], load(x + k, lanes(numbers - k)), lanes(numbers - k));
    const int threads = int(std::min<long>(most, 1 + numbers * w.rows / ENOUGH));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long stretch = 0; stretch < stretches; ++stretch)
        for (int i = 0; i < product.m; i += SIDE_BY_SIDE)
            RUNS[std::min(SIDE_BY_SIDE, product.m - i)](
                *product.w, stretch * STRETCH, &wide[size_t(i) * product.w->columns], product.out + i * product.stride,
                product.stride
            );
}

using Run = void (*)(const Task&, long);
constexpr Run RUNS[TILE + 1] = {nullptr, run<1>, run<2>, run<3>, run<4>, run<5>, run<6>, run<7>, run<8>};

int tiles_of(int m) { return (m + TILE - 1) / TILE; }

void multiply_rows(const Product* products, int count, int threads) {
    const Blocks blocks(products, count, threads);
    std::vector<int> starts{0};  // of each product's tasks
    std::vector<int> own;        // tasks that read x themselves
    std::vector<Task> tasks;
    for (int i = 0; i < count; ++i) starts.push_back(starts.back() + tiles_of(products[i].m));
    tasks.reserve(starts.back());
    for (int i = 0; i < count; ++i) {
        const auto [w, x, m, out, stride] = products[i];
        const int tiles = tiles_of(m), first = like(products, i);
        for (int tile = 0; tile < tiles; ++tile) {
            const int start = int(long(tile) * m / tiles), end = int(long(tile + 1) * m / tiles);  // rows of x
            if (first == i) own.push_back(int(tasks.size()));
            Task& task = tasks.emplace_back();
            static_cast<Product&>(task) = {w, x + long(start) * w->columns, end - start, out + start * stride, stride};
            task.inputs = &tasks[starts[first] + tile].own;
        }
    }
    side_by_side(int(own.size()), blocks.threads, [&](int i) {
        Task& task = tasks[own[i]];
        if (task.w->kind == Matrix::INT8_INT8) task.bytes = encode(*task.w, task.x, task.m, 1);
        else task.own = arrange(*task.w, task.x, task.m);
    });
    const long all = blocks.ends.back();
#pragma omp parallel for num_threads(blocks.threads) schedule(dynamic, blocks.turn)
    for (long unit = 0; unit < all; ++unit) {
        const auto [product, block] = blocks.find(unit);
        for (int i = starts[product]; i < starts[product + 1]; ++i) RUNS[tasks[i].m](tasks[i], block);
    }
}

}  // namespace

void multiply(const Product* products, int count, int threads) {
    std::vector<Product> tiles, vectors;
    for (const Product* product = products; product < products + count; ++product) {
        if (product->m == 0) continue;
        if (product->w->kind == Matrix::TURNED) multiply_turned(*product, threads);
#ifdef __AMX_TILE__
        else if (fits_tile(*product)) tiles.push_back(*product);
#endif
        else vectors.push_back(*product);
    }
#ifdef __AMX_TILE__
    if (!tiles.empty()) multiply_tiles(tiles.data(), int(tiles.size()), threads);
#endif
    if (!vectors.empty()) multiply_rows(vectors.data(), int(vectors.size()), threads);
}

void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads) {
    std::vector<Product> products(count);
    long stride = 0;
    for (int i = 0; i < count; ++i) stride += matrices[i].rows;
    for (int i = 0; i < count; out += matrices[i++].rows) products[i] = {matrices + i, x, m, out, stride};
    multiply(products.data(), count, threads);
}
