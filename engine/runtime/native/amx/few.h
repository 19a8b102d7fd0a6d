// `multiply` for as many rows of x as a tile has, at most.
#pragma once
#include "products.h"

constexpr int FEWEST = 2;  // rows of x: vectors are faster for one (measured on Sapphire Rapids)

// Whether it was done: not for other numbers of rows, or groups that are no multiple of 32 columns.
bool multiply_tile(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads);
