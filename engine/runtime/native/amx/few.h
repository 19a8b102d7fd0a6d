// `multiply` for as many rows of each x as a tile has, at most.
#pragma once
#include "products.h"

constexpr int FEWEST = 2;  // rows of x: vectors are faster for one (measured on Sapphire Rapids)

// Whether tiles compute a product: not for other numbers of rows, or groups that are no multiple of 32 columns.
bool fits_tile(const Product& product);

// All products, which fit.
void multiply_tiles(const Product* products, int count, int threads);
