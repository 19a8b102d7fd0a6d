// Products of a few or many rows of bfloat16 activations with a weight in one of five layouts.
#pragma once
#include <algorithm>
#include <vector>

#include "vectors.h"

constexpr int ROWS = 16;          // of W, one for each lane of a vector of float32
constexpr long ENOUGH = 1 << 16;  // products of a weight with an input that are worth another thread

// Mirrored by `_Matrix` in library.py. Packed weights are blocks of 16 rows of W, the last padded with rows of zeros.
struct Matrix {
    enum Kind : int32_t {
        DENSE,      // bf16 (rows, columns)
        INT4,       // (blocks, columns / 8, 16 rows, 2 columns) of uint16: nibble j is the code of column 2 j + parity
        INT8,       // (blocks, columns / 4, 2 pairs, 16 rows, 2 columns) of int8
        INT8_INT8,  // int8 (rows, columns); inputs are rounded to int8 too
        TURNED,     // bf16 (columns, rows), as GPT-2 has them; for few rows of x, and alone
    };
    int32_t kind, rows, columns, group;
    const void* weight;
    const bf16* scale;      // INT4, INT8: (blocks, groups, 16); INT8_INT8: (rows)
    const int8_t* zero;     // INT4, INT8: (blocks, groups, 16), counted from the middle; null: all at the middle
    const int32_t* sums;    // INT8_INT8: (rows), the sum of each row's codes
    const bf16* bias;       // (rows) or null
    float input_scale;      // INT8_INT8: fixed, or 0 where each row of the inputs has its own
};

inline long blocks(const Matrix& w) { return (w.rows + ROWS - 1) / ROWS; }

// Whether both read x in the same order.
inline bool same_inputs(const Matrix& a, const Matrix& b) {
    return a.kind == b.kind && a.group == b.group && !a.zero == !b.zero;
}

// Rows of x times one matrix.
struct Product {
    const Matrix* w;
    const bf16* x;  // (m, columns)
    int m;
    bf16* out;      // m rows of the matrix's many
    long stride;    // from one of these to the next
};

// The first product up to number `i` that reads the same rows in the same order; those of INT8_INT8 share nothing.
inline int like(const Product* products, int i) {
    const auto& [w, x, m, out, stride] = products[i];
    for (int j = 0; j < i && w->kind != Matrix::INT8_INT8; ++j)
        if (products[j].x == x && products[j].m == m && same_inputs(*products[j].w, *w)) return j;
    return i;
}

// The blocks of all products in a row, and how threads take them: by turns, for cores are not equally fast.
struct Blocks {
    std::vector<long> ends;  // how many blocks the products have up to each
    int threads;
    long turn;

    Blocks(const Product* products, int count, int most) : ends(count) {
        long all = 0, work = 0;
        for (int i = 0; i < count; ++i) {
            const auto& [w, x, m, out, stride] = products[i];
            ends[i] = all += blocks(*w);
            work += long(m) * w->rows * w->columns;
        }
        threads = int(std::min<long>(most, 1 + work / ENOUGH));
        turn = std::max(1L, all / (threads * 16L));
    }

    struct Place {
        int product;
        long block;
    };
    Place find(long unit) const {
        if (unit < ends[0]) return {0, unit};
        const long i = std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin();
        return {int(i), unit - ends[i - 1]};
    }
};

// Calls f with each number below `count`; one alone gets no team of threads, which took 1 to 3 us of a product's 40.
template <typename F> void side_by_side(int count, int threads, F f) {
    if (count == 1) return f(0);
#pragma omp parallel for num_threads(std::min(threads, count)) schedule(static)
    for (int i = 0; i < count; ++i) f(i);
}

// All products, of few rows each; those of the same x read it once.
void multiply(const Product* products, int count, int threads);

// out (M, sum of rows) = x (M, columns) times all `count` matrices, which read the same x. For few rows.
void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads);

// out (M, rows) = x (M, columns) W^T for the packed layouts and many rows: W is unpacked some rows at a time; INT8_INT8
// (columns a multiple of 4) stays in integers.
void multiply_many(const Matrix& matrix, const bf16* x, long m, bf16* out, int threads);
