// Rows of inputs rounded to eight bits.
#pragma once
#include <cfloat>
#include <vector>

#include "rows.h"

// Rows of x rounded as `InputGrid.encode` does, in bfloat16; the scale of a row in which something is no number is none.
struct Bytes {
    std::vector<Step> codes;    // (M, columns), each with `MIDDLE` added
    std::vector<float> scales;  // (M)
};

inline Bytes encode(const Matrix& w, const bf16* inputs, long m, int threads) {
    Bytes in{std::vector<Step>(size_t(m) * w.columns), std::vector<float>(m)};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < m; ++i) {
        const bf16* x = inputs + i * w.columns;
        Floats greatest = zeros(), none = zeros();  // a comparison would forget what is no number
        for (int k = 0; k < w.columns; k += 16) {
            const Floats values = absolute(load(x + k, lanes(w.columns - k)));
            greatest = larger(greatest, values);
            none = fused(smaller(all(FLT_MAX), values), zeros(), none);
        }
        float scale = widen(narrow(w.input_scale != 0 ? w.input_scale : largest(greatest) / 127.5f));
        if (scale == 0) scale = 0.0078125f;  // bfloat16's epsilon
        in.scales[i] = scale + sum(none);
        for (int k = 0; k < w.columns; k += 16) {
            const Lanes mask = lanes(w.columns - k);
            const Floats steps = rounded(load(x + k, mask) / all(scale));
            // Before they are whole numbers: those of 32 bits have no place for what lies far beyond a fixed grid.
            store_steps(&in.codes[size_t(i) * w.columns + k], larger(all(-128), smaller(all(127), steps)), mask);
        }
    }
    return in;
}
