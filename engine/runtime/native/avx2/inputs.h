// Rows of inputs in the order and the numbers in which AVX2's products read them.
#pragma once
#include "wholes.h"

namespace {

// Whole numbers for packed layouts, float32 for dense weights.
struct Inputs : Wholes {
    std::vector<float> wide;  // (m, columns up to whole 16): of 16 those at even places first
};
[[maybe_unused]] Inputs arrange(const Matrix& w, const bf16* x, int m) {
    if (w.kind != Matrix::DENSE) return {whole_numbers(w, x, m), {}};
    Inputs in;
    const int wide = (w.columns + 15) / 16 * 16;
    in.wide.resize(size_t(wide) * m);
    for (int i = 0; i < m; ++i)
        for (int k = 0; k < w.columns; ++k)
            in.wide[size_t(i) * wide + k / 16 * 16 + k % 2 * 8 + k % 16 / 2] = widen(x[long(i) * w.columns + k]);
    return in;
}

}  // namespace
