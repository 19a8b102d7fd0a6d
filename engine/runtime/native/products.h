// Products of a few or many rows of bfloat16 activations with a weight in one of four layouts.
#pragma once
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

// out (M, sum of rows) = x (M, columns) times all `count` matrices, which read the same x. For few rows.
void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads);

// out (M, rows) = x (M, columns) W^T for the packed layouts and many rows: W is unpacked some rows at a time; INT8_INT8
// (columns a multiple of 4) stays in integers.
void multiply_many(const Matrix& matrix, const bf16* x, long m, bf16* out, int threads);
