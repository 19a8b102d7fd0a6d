// Rows of inputs rounded to eight bits.
#pragma once
#include <vector>

#include "rows.h"

// Rows of x rounded as `InputGrid.encode` does, in bfloat16.
struct Bytes {
    std::vector<Step> codes;    // (M, columns), each with `MIDDLE` added
    std::vector<float> scales;  // (M)
};

inline Bytes encode(const Matrix& w, const bf16* inputs, long m, int threads) {
    Bytes in{std::vector<Step>(size_t(m) * w.columns), std::vector<float>(m)};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < m; ++i) {
        const bf16* x = inputs + i * w.columns;
        Floats greatest = zeros();
        for (int k = 0; k < w.columns; k += 16)
            greatest = larger(greatest, absolute(load(x + k, lanes(w.columns - k))));
        float scale = widen(narrow(w.input_scale != 0 ? w.input_scale : largest(greatest) / 127.5f));
        if (scale == 0) scale = 0.0078125f;  // bfloat16's epsilon
        in.scales[i] = scale;
        for (int k = 0; k < w.columns; k += 16) {
            const Lanes mask = lanes(w.columns - k);
            store_steps(&in.codes[size_t(i) * w.columns + k], rounded(load(x + k, mask) / all(scale)), mask);
        }
    }
    return in;
}
