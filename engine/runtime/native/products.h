// Products of a few or many rows of bfloat16 activations with a weight in one of five layouts.
#pragma once
#include <algorithm>

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

// The blocks of all matrices in a row, and how threads take them: by turns, for cores are not equally fast.
struct Blocks {
    const Matrix* matrices;
    long stride = 0, all = 0;  // of the output; blocks
    int threads;
    long turn;

    Blocks(const Matrix* matrices, int count, int m, int most) : matrices(matrices) {
        for (int i = 0; i < count; ++i) stride += matrices[i].rows, all += blocks(matrices[i]);
        threads = int(std::min<long>(most, 1 + m * stride * matrices[0].columns / ENOUGH));
        turn = std::max(1L, all / (threads * 16L));
    }

    struct Place {
        int matrix;
        long block, at;  // at: the matrix's first output
    };
    Place find(long unit) const {
        Place place{0, unit, 0};
        for (; place.block >= blocks(matrices[place.matrix]); ++place.matrix) {
            place.block -= blocks(matrices[place.matrix]);
            place.at += matrices[place.matrix].rows;
        }
        return place;
    }
};

// out (M, sum of rows) = x (M, columns) times all `count` matrices, which read the same x. For few rows.
void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads);

// out (M, rows) = x (M, columns) W^T for the packed layouts and many rows: W is unpacked some rows at a time; INT8_INT8
// (columns a multiple of 4) stays in integers.
void multiply_many(const Matrix& matrix, const bf16* x, long m, bf16* out, int threads);
