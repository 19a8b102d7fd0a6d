// Decoding reads every weight once for each token, so its time is the time of the bytes; what is done with each byte
// must fit beside the loads. Codes become bfloat16 numbers without error and enter the processor's dot product of
// bfloat16 pairs with float32 sums; a group's sum is multiplied by its scale once.
#include "products.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int ROWS = 16;  // of W, one for each lane of a vector of float32
constexpr int TILE = 8;   // rows of x at a time
constexpr long ENOUGH = 1 << 16;  // products of a weight with an input that are worth another thread

// W = 4: the sixteen levels code - 8 as bfloat16, twice, so that bit 4 of an index, which belongs to the next
// code, does not matter.
const __m512i LEVELS = [] {
    alignas(64) bf16 levels[32];
    for (int i = 0; i < 32; ++i) levels[i] = narrow(float(i % 16 - 8));
    return _mm512_load_si512(levels);
}();

// The next 64 bytes of a packed block as `PAIRS` vectors of bfloat16: (16 rows, 2 columns) each.
template <int KIND> struct Codes;
template <> struct Codes<Matrix::INT4> {
    static constexpr int PAIRS = 4;
    static void unpack(const uint8_t* from, __m512i* pairs) {
        const __m512i codes = _mm512_loadu_si512(from);
        pairs[0] = _mm512_permutexvar_epi16(codes, LEVELS);
        pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), LEVELS);
        pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), LEVELS);
        pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), LEVELS);
    }
};
template <> struct Codes<Matrix::INT8> {
    static constexpr int PAIRS = 2;
    static __m512 sixteen(const uint8_t* from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    }
    static void unpack(const uint8_t* from, __m512i* pairs) {
        pairs[0] = (__m512i)_mm512_cvtne2ps_pbh(sixteen(from + 16), sixteen(from));
        pairs[1] = (__m512i)_mm512_cvtne2ps_pbh(sixteen(from + 48), sixteen(from + 32));
    }
};

__m512 load_zero(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))); }

// `M` rows of x as the packed layouts read them.
struct Inputs {
    std::vector<uint32_t> pairs;  // (columns / 2, M): two neighbours of a row each
    std::vector<float> sums;      // (groups, M): of each group, for zero points
};

Inputs arrange(const Matrix& w, const bf16* x, int m) {
    Inputs in;
    in.pairs.resize(size_t(w.columns) / 2 * m);
    for (int i = 0; i < m; ++i) {
        const uint32_t* row = (const uint32_t*)(x + long(i) * w.columns);
        for (int k = 0; k < w.columns / 2; ++k) in.pairs[size_t(k) * m + i] = row[k];
    }
    if (w.zero == nullptr) return in;
    in.sums.assign(size_t(w.columns / w.group) * m, 0.0f);
    for (int i = 0; i < m; ++i)
        for (int k = 0; k < w.columns; ++k) in.sums[size_t(k / w.group) * m + i] += widen(x[long(i) * w.columns + k]);
    return in;
}

// totals[i] = the products of row i of x with the 16 rows of W in `block`.
template <int KIND, int M> void packed_block(const Matrix& w, long block, const Inputs& in, __m512* totals) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS, CHAINS = M <= 2 ? PAIRS : 1;
    const int groups = w.columns / w.group;
    const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / STEP) * 64;
    const uint32_t* x = in.pairs.data();
    for (int i = 0; i < M; ++i) totals[i] = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
        __m512 sums[CHAINS][M];
        for (auto& chain : sums) std::fill(chain, chain + M, _mm512_setzero_ps());
        for (int c = 0; c < w.group / STEP; ++c, codes += 64, x += PAIRS * M) {
            __m512i pairs[PAIRS];
            Codes<KIND>::unpack(codes, pairs);
            for (int j = 0; j < PAIRS; ++j)
                for (int i = 0; i < M; ++i)
                    sums[j % CHAINS][i] = dot(sums[j % CHAINS][i], pairs[j], _mm512_set1_epi32(int(x[j * M + i])));
        }
        const __m512 scale = load(w.scale + (block * groups + g) * ROWS);
        const __m512 zero = w.zero ? load_zero(w.zero + (block * groups + g) * ROWS) : _mm512_setzero_ps();
        for (int i = 0; i < M; ++i) {
            __m512 sum = sums[0][i];
            for (int j = 1; j < CHAINS; ++j) sum = _mm512_add_ps(sum, sums[j][i]);
            if (w.zero) sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(in.sums[size_t(g) * M + i]), sum);
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
                for (int i = 0; i < M; ++i)
                    sums[i][j] = dot(sums[i][j], weights, _mm512_loadu_si512(x + long(i) * w.columns + k + 32 * j));
            }
        for (; k < w.columns; k += 32) {
            const __mmask32 mask = w.columns - k >= 32 ? ~__mmask32(0) : (__mmask32(1) << (w.columns - k)) - 1;
            const __m512i weights = _mm512_maskz_loadu_epi16(mask, row + k);
            for (int i = 0; i < M; ++i)
                sums[i][0] = dot(sums[i][0], weights, _mm512_maskz_loadu_epi16(mask, x + long(i) * w.columns + k));
        }
        for (int i = 0; i < M; ++i) {
            for (int j = 1; j < CHAINS; ++j) sums[i][0] = _mm512_add_ps(sums[i][0], sums[i][j]);
            found[i][r] = _mm512_reduce_add_ps(sums[i][0]);
        }
    }
    for (int i = 0; i < M; ++i) totals[i] = _mm512_load_ps(found[i]);
}

// Rows of x rounded as `InputGrid.encode` does, in bfloat16; codes plus 128, because the dot product of bytes wants
// one unsigned side.
struct Bytes {
    std::vector<uint8_t> codes;  // (M, columns)
    std::vector<float> scales;   // (M)
};

Bytes encode(const Matrix& w, const bf16* inputs, long m, int threads) {
    Bytes in{std::vector<uint8_t>(size_t(m) * w.columns), std::vector<float>(m)};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < m; ++i) {
        const bf16* x = inputs + i * w.columns;
        __m512 largest = _mm512_setzero_ps();
        for (int k = 0; k < w.columns; k += 16)
            largest = _mm512_max_ps(largest, _mm512_abs_ps(load(x + k, lanes(w.columns - k))));
        float scale = widen(narrow(w.input_scale != 0 ? w.input_scale : _mm512_reduce_max_ps(largest) / 127.5f));
        if (scale == 0) scale = 0.0078125f;  // bfloat16's epsilon
        in.scales[i] = scale;
        for (int k = 0; k < w.columns; k += 16) {
            const __mmask16 mask = lanes(w.columns - k);
            const __m512 steps = rounded(_mm512_div_ps(load(x + k, mask), _mm512_set1_ps(scale)));
            __m512i codes = _mm512_cvtps_epi32(steps);  // to nearest, ties to even
            codes = _mm512_max_epi32(_mm512_min_epi32(codes, _mm512_set1_epi32(127)), _mm512_set1_epi32(-128));
            codes = _mm512_add_epi32(codes, _mm512_set1_epi32(128));
            _mm_mask_storeu_epi8(&in.codes[size_t(i) * w.columns + k], mask, _mm512_cvtepi32_epi8(codes));
        }
    }
    return in;
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
            for (int i = 0; i < M; ++i)
                sums[i] = _mm512_dpbusd_epi32(
                    sums[i], _mm512_maskz_loadu_epi8(mask, &in.codes[size_t(i) * w.columns + k]), weights);
        }
        for (int i = 0; i < M; ++i) {
            const int32_t sum = _mm512_reduce_add_epi32(sums[i]) - 128 * w.sums[at];
            found[i][r] = float(sum) * in.scales[i] * widen(w.scale[at]);
        }
    }
    for (int i = 0; i < M; ++i) totals[i] = _mm512_load_ps(found[i]);
}

// One matrix and `M` rows of x: everything that a block of 16 rows of W needs.
struct Task {
    const Matrix* w;
    const bf16* x;
    bf16* out;
    long stride;  // of out
    Inputs packed;
    Bytes bytes;
};

template <int M> void run(const Task& task, long block) {
    const Matrix& w = *task.w;
    __m512 totals[M];
    switch (w.kind) {
        case Matrix::INT4: packed_block<Matrix::INT4, M>(w, block, task.packed, totals); break;
        case Matrix::INT8: packed_block<Matrix::INT8, M>(w, block, task.packed, totals); break;
        case Matrix::INT8_INT8: bytes_block<M>(w, block, task.bytes, totals); break;
        default: dense_block<M>(w, block, task.x, totals);
    }
    const __mmask16 mask = lanes(w.rows - block * ROWS);
    const __m512 bias = w.bias ? load(w.bias + block * ROWS, mask) : _mm512_setzero_ps();
    for (int i = 0; i < M; ++i) store(task.out + i * task.stride + block * ROWS, _mm512_add_ps(totals[i], bias), mask);
}

using Run = void (*)(const Task&, long);
constexpr Run RUNS[TILE + 1] = {nullptr, run<1>, run<2>, run<3>, run<4>, run<5>, run<6>, run<7>, run<8>};

long blocks(const Matrix& w) { return (w.rows + ROWS - 1) / ROWS; }

// 64 rows of W in bfloat16, ordered (columns / 2, 64 rows, 2 columns).
template <int KIND> void unpack_panel(const Matrix& w, long panel, uint32_t* to) {
    constexpr int PAIRS = Codes<KIND>::PAIRS, STEP = 2 * PAIRS;
    const int groups = w.columns / w.group;
    for (int part = 0; part < 4; ++part) {
        const long block = panel * 4 + part;
        if (block >= blocks(w)) {
            for (int k = 0; k < w.columns / 2; ++k) _mm512_storeu_si512(to + k * 64 + part * 16, _mm512_setzero_si512());
            continue;
        }
        const uint8_t* codes = (const uint8_t*)w.weight + block * (w.columns / STEP) * 64;
        uint32_t* at = to + part * 16;
        for (int g = 0; g < groups; ++g) {
            const __m512 scale = load(w.scale + (block * groups + g) * ROWS);
            const __m512 zero = w.zero ? load_zero(w.zero + (block * groups + g) * ROWS) : _mm512_setzero_ps();
            for (int c = 0; c < w.group / STEP; ++c, codes += 64) {
                __m512i pairs[PAIRS];
                Codes<KIND>::unpack(codes, pairs);
                for (int j = 0; j < PAIRS; ++j, at += 64) {
                    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[j], 16));
                    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs[j], _mm512_set1_epi32(int(0xffff0000))));
                    even = _mm512_mul_ps(_mm512_sub_ps(even, zero), scale);
                    odd = _mm512_mul_ps(_mm512_sub_ps(odd, zero), scale);
                    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
                    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
                    _mm512_storeu_si512(at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                }
            }
        }
    }
}

// out (M, 64) = M rows of x times an unpacked panel.
template <int M> void panel_product(const Matrix& w, long panel, const uint32_t* weights, const bf16* x, bf16* out) {
    __m512 sums[M][4];
    for (auto& row : sums) std::fill(row, row + 4, _mm512_setzero_ps());
    const uint32_t* pairs = (const uint32_t*)x;
    const long half = w.columns / 2;
    for (long k = 0; k < half; ++k, weights += 64) {
        __m512i b[4];
        for (int part = 0; part < 4; ++part) b[part] = _mm512_loadu_si512(weights + part * 16);
        for (int i = 0; i < M; ++i) {
            const __m512i a = _mm512_set1_epi32(int(pairs[i * half + k]));
            for (int part = 0; part < 4; ++part) sums[i][part] = dot(sums[i][part], b[part], a);
        }
    }
    for (int part = 0; part < 4; ++part) {
        const long row = panel * 64 + part * ROWS;
        if (row >= w.rows) break;
        const __mmask16 mask = lanes(w.rows - row);
        const __m512 bias = w.bias ? load(w.bias + row, mask) : _mm512_setzero_ps();
        for (int i = 0; i < M; ++i) store(out + long(i) * w.rows + row, _mm512_add_ps(sums[i][part], bias), mask);
    }
}

using PanelProduct = void (*)(const Matrix&, long, const uint32_t*, const bf16*, bf16*);
constexpr int PANEL_TILE = 6;  // times 4 sums, 4 weights and an input: 29 of 32 registers
constexpr PanelProduct PANELS[PANEL_TILE + 1] = {
    nullptr, panel_product<1>, panel_product<2>, panel_product<3>, panel_product<4>, panel_product<5>, panel_product<6>};

// 64 rows of INT8_INT8 codes, ordered (columns / 4, 64 rows, 4 columns); past the last row it repeats.
void order_panel(const Matrix& w, long panel, int32_t* to) {
    for (int part = 0; part < 4; ++part) {
        alignas(64) int32_t starts[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            const long row = std::min<long>(panel * 64 + part * ROWS + r, w.rows - 1);
            starts[r] = int32_t((row - std::min<long>(panel * 64, w.rows - 1)) * w.columns);
        }
        const __m512i index = _mm512_load_si512(starts);
        const int8_t* from = (const int8_t*)w.weight + std::min<long>(panel * 64, w.rows - 1) * w.columns;
        for (int k = 0; k < w.columns / 4; ++k)
            _mm512_storeu_si512(to + k * 64 + part * ROWS, _mm512_i32gather_epi32(index, from + k * 4, 1));
    }
}

// As `panel_product`, in integers; `first` is the number of the first row of x.
template <int M> void bytes_panel_product(const Matrix& w, long panel, const int32_t* weights, const Bytes& in, long first,
                                          bf16* out) {
    __m512i sums[M][4];
    for (auto& row : sums) std::fill(row, row + 4, _mm512_setzero_si512());
    const long quarter = w.columns / 4;
    const int32_t* codes = (const int32_t*)in.codes.data() + first * quarter;
    for (long k = 0; k < quarter; ++k, weights += 64) {
        __m512i b[4];
        for (int part = 0; part < 4; ++part) b[part] = _mm512_loadu_si512(weights + part * ROWS);
        for (int i = 0; i < M; ++i) {
            const __m512i a = _mm512_set1_epi32(codes[i * quarter + k]);
            for (int part = 0; part < 4; ++part) sums[i][part] = _mm512_dpbusd_epi32(sums[i][part], a, b[part]);
        }
    }
    for (int part = 0; part < 4; ++part) {
        const long row = panel * 64 + part * ROWS;
        if (row >= w.rows) break;
        const __mmask16 mask = lanes(w.rows - row);
        const __m512 scale = load(w.scale + row, mask), bias = w.bias ? load(w.bias + row, mask) : _mm512_setzero_ps();
        const __m512i shift = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, w.sums + row), 7);
        for (int i = 0; i < M; ++i) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][part], shift));
            const __m512 y = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(in.scales[first + i])), scale);
            store(out + long(i) * w.rows + row, _mm512_add_ps(y, bias), mask);
        }
    }
}

using BytesPanelProduct = void (*)(const Matrix&, long, const int32_t*, const Bytes&, long, bf16*);
constexpr BytesPanelProduct BYTES_PANELS[PANEL_TILE + 1] = {
    nullptr, bytes_panel_product<1>, bytes_panel_product<2>, bytes_panel_product<3>,
    bytes_panel_product<4>, bytes_panel_product<5>, bytes_panel_product<6>};

}  // namespace

void multiply(const Matrix* matrices, int count, const bf16* x, int m, bf16* out, int threads) {
    std::vector<Task> tasks;  // (tiles of x, matrices)
    const int tiles = (m + TILE - 1) / TILE;
    long stride = 0, all = 0;
    for (int i = 0; i < count; ++i) stride += matrices[i].rows, all += blocks(matrices[i]);
    for (int tile = 0, start = 0; tile < tiles; ++tile) {
        const int rows = (m - start + tiles - tile - 1) / (tiles - tile);
        bf16* at = out + start * stride;
        for (int i = 0; i < count; ++i) {
            const Matrix& w = matrices[i];
            const bf16* from = x + long(start) * w.columns;
            Task task{&w, from, at, stride, {}, {}};
            if (w.kind == Matrix::INT4 || w.kind == Matrix::INT8) task.packed = arrange(w, from, rows);
            if (w.kind == Matrix::INT8_INT8) task.bytes = encode(w, from, rows, 1);
            tasks.push_back(std::move(task));
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

void multiply_many(const Matrix& w, const bf16* x, long m, bf16* out, int threads) {
    const long panels = (w.rows + 63) / 64;
    threads = int(std::min(long(threads), 1 + m * w.columns * w.rows / ENOUGH));
    const Bytes bytes = w.kind == Matrix::INT8_INT8 ? encode(w, x, m, threads) : Bytes{};
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> panel(size_t(w.columns) / 2 * 64);
        int32_t* ordered = (int32_t*)panel.data();
#pragma omp for schedule(static)
        for (long p = 0; p < panels; ++p) {
            if (w.kind == Matrix::INT4) unpack_panel<Matrix::INT4>(w, p, panel.data());
            if (w.kind == Matrix::INT8) unpack_panel<Matrix::INT8>(w, p, panel.data());
            if (w.kind == Matrix::INT8_INT8) order_panel(w, p, ordered);
            for (long start = 0; start < m; start += PANEL_TILE) {
                const int rows = int(std::min<long>(PANEL_TILE, m - start));
                bf16* to = out + start * w.rows;
                if (w.kind == Matrix::INT8_INT8) BYTES_PANELS[rows](w, p, ordered, bytes, start, to);
                else PANELS[rows](w, p, panel.data(), x + start * w.columns, to);
            }
        }
    }
}
