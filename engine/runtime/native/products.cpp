// Few rows: decoding reads every weight once for each token, so its time is the time of the bytes; what is done with each byte
// must fit beside the loads. Codes become bfloat16 numbers without error and enter the processor's dot product of
// bfloat16 pairs with float32 sums; a group's sum is multiplied by its scale once.
#include "products.h"

#include <algorithm>
#include <vector>

#include "codes.h"

namespace {

constexpr int TILE = 8;  // rows of x at a time; loops over them are unrolled, else g++ keeps the sums in memory

// `m` rows of x as the packed layouts read them: (columns / 2, m), two neighbours of a row each.
std::vector<uint32_t> arrange(const bf16* x, int columns, int m) {
    std::vector<uint32_t> pairs(size_t(columns) / 2 * m);
    for (int i = 0; i < m; ++i) {
        const uint32_t* row = (const uint32_t*)(x + long(i) * columns);
        for (int k = 0; k < columns / 2; ++k) pairs[size_t(k) * m + i] = row[k];
    }
    return pairs;
}

// (groups, m): the sum of each group of each row, for zero points; nothing where there are none.
std::vector<float> group_sums(const Matrix& w, const bf16* x, int m) {
    if (w.zero == nullptr) return {};
    std::vector<float> sums(size_t(w.columns / w.group) * m);
    for (int i = 0; i < m; ++i)
        for (int k = 0; k < w.columns; ++k) sums[size_t(k / w.group) * m + i] += widen(x[long(i) * w.columns + k]);
    return sums;
}

// totals[i] = the products of row i of x with the 16 rows of W in `block`.
template <int KIND, int M> void packed_block(const Matrix& w, long block, const uint32_t* x, const float* x_sums, __m512* totals) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS, CHAINS = M <= 2 ? PAIRS : 1;
    const int groups = w.columns / w.group;
    const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / STEP) * 64;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) totals[i] = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
        __m512 sums[CHAINS][M];
        for (auto& chain : sums) std::fill(chain, chain + M, _mm512_setzero_ps());
        for (int c = 0; c < w.group / STEP; ++c, codes += 64, x += PAIRS * M) {
            __m512i pairs[PAIRS];
            Codes<KIND>::unpack(codes, pairs);
            for (int j = 0; j < PAIRS; ++j)
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i)
                    sums[j % CHAINS][i] = dot(sums[j % CHAINS][i], pairs[j], _mm512_set1_epi32(int(x[j * M + i])));
        }
        const __m512 scale = load(w.scale + (block * groups + g) * ROWS);
        const __m512 zero = w.zero ? load_zero(w.zero + (block * groups + g) * ROWS) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            __m512 sum = sums[0][i];
            for (int j = 1; j < CHAINS; ++j) sum = _mm512_add_ps(sum, sums[j][i]);
            if (w.zero) sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x_sums[g * M + i]), sum);
            totals[i] = _mm512_fmadd_ps(sum, scale, totals[i]);
        }
    }
}

template <int M> void dense_block(const Matrix& w, long block, const bf16* x, __m512* totals) {
    alignas(64) float found[M][ROWS] = {};
    for (int r = 0; r < ROWS && block * ROWS + r < w.rows; ++r) {
        const bf16* row = (const bf16*)w.weight + (block * ROWS + r) * w.columns;
        constexpr int CHAINS = M <= 2 ? 4 : 1;
        __m512 sums[M][CHAINS];
        for (auto& chains : sums) std::fill(chains, chains + CHAINS, _mm512_setzero_ps());
        int k = 0;
        for (; k + 32 * CHAINS <= w.columns; k += 32 * CHAINS)
            for (int j = 0; j < CHAINS; ++j) {
                const __m512i weights = _mm512_loadu_si512(row + k + 32 * j);
#pragma GCC unroll 8
                for (int i = 0; i < M; ++i)
                    sums[i][j] = dot(sums[i][j], weights, _mm512_loadu_si512(x + long(i) * w.columns + k + 32 * j));
            }
        for (; k < w.columns; k += 32) {
            const __mmask32 mask = w.columns - k >= 32 ? ~__mmask32(0) : (__mmask32(1) << (w.columns - k)) - 1;
            const __m512i weights = _mm512_maskz_loadu_epi16(mask, row + k);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i)
                sums[i][0] = dot(sums[i][0], weights, _mm512_maskz_loadu_epi16(mask, x + long(i) * w.columns + k));
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            for (int j = 1; j < CHAINS; ++j) sums[i][0] = _mm512_add_ps(sums[i][0], sums[i][j]);
            found[i][r] = _mm512_reduce_add_ps(sums[i][0]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) totals[i] = _mm512_load_ps(found[i]);
}

template <int M> void bytes_block(const Matrix& w, long block, const Bytes& in, __m512* totals) {
    alignas(64) float found[M][ROWS] = {};
    for (int r = 0; r < ROWS && block * ROWS + r < w.rows; ++r) {
        const long at = block * ROWS + r;
        const int8_t* row = (const int8_t*)w.weight + at * w.columns;
        __m512i sums[M];
        std::fill(sums, sums + M, _mm512_setzero_si512());
        for (int k = 0; k < w.columns; k += 64) {
            const int left = w.columns - k;
            const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
            const __m512i weights = _mm512_maskz_loadu_epi8(mask, row + k);
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i)
                sums[i] = _mm512_dpbusd_epi32(
                    sums[i], _mm512_maskz_loadu_epi8(mask, &in.codes[size_t(i) * w.columns + k]), weights);
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const int32_t sum = _mm512_reduce_add_epi32(sums[i]) - 128 * w.sums[at];
            found[i][r] = float(sum) * in.scales[i] * widen(w.scale[at]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) totals[i] = _mm512_load_ps(found[i]);
}

// One matrix and `M` rows of x: everything that a block of 16 rows of W needs.
struct Task {
    const Matrix* w;
    const bf16* x;
    bf16* out;
    long stride;  // of out
    const uint32_t* pairs;
    std::vector<float> sums;
    Bytes bytes;
};

template <int M> void run(const Task& task, long block) {
    const Matrix& w = *task.w;
    __m512 totals[M];
    switch (w.kind) {
        case Matrix::INT4: packed_block<Matrix::INT4, M>(w, block, task.pairs, task.sums.data(), totals); break;
        case Matrix::INT8: packed_block<Matrix::INT8, M>(w, block, task.pairs, task.sums.data(), totals); break;
        case Matrix::INT8_INT8: bytes_block<M>(w, block, task.bytes, totals); break;
        default: dense_block<M>(w, block, task.x, totals);
    }
    const __mmask16 mask = lanes(w.rows - block * ROWS);
    const __m512 bias = w.bias ? load(w.bias + block * ROWS, mask) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) store(task.out + i * task.stride + block * ROWS, _mm512_add_ps(totals[i], bias), mask);
}

using Run = void (*)(const Task&, long);
constexpr Run RUNS[TILE + 1] = {nullptr, run<1>, run<2>, run<3>, run<4>, run<5>, run<6>, run<7>, run<8>};

}  // namespace

void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads) {
    std::vector<Task> tasks;  // (tiles of x, matrices)
    const int tiles = (m + TILE - 1) / TILE;
    long stride = 0, all = 0;
    for (int i = 0; i < count; ++i) stride += matrices[i].rows, all += blocks(matrices[i]);
    std::vector<std::vector<uint32_t>> pairs(tiles);  // shared by all matrices
    for (int tile = 0, start = 0; tile < tiles; ++tile) {
        const int rows = (m - start + tiles - tile - 1) / (tiles - tile);
        const bf16* from = x + long(start) * matrices[0].columns;
        bf16* at = out + start * stride;
        for (int i = 0; i < count; ++i) {
            const Matrix& w = matrices[i];
            const bool packed = w.kind == Matrix::INT4 || w.kind == Matrix::INT8;
            if (packed && pairs[tile].empty()) pairs[tile] = arrange(from, w.columns, rows);
            tasks.push_back({&w, from, at, stride, pairs[tile].data(), group_sums(w, from, rows),
                             w.kind == Matrix::INT8_INT8 ? encode(w, from, rows, 1) : Bytes{}});
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
