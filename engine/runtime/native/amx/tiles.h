// Tiles (AMX): registers of 16 rows of 64 bytes, and one instruction that multiplies two of them and adds to a third.
// Rows of x stand in one as they are, rows of W as columns: four bytes of each of 16 rows of W are a row of the tile.
#pragma once
#include <memory>

#include "unpack.h"

namespace {

constexpr int SIDE = 16;                      // of a tile's rows and of its 32-bit columns
constexpr int PARTS = PANEL / SIDE;
struct alignas(64) Line { uint8_t bytes[64]; };
using Lines = std::unique_ptr<Line[]>;        // 16 of them are a tile; nothing in them at first

// While one lives its thread has all eight tiles: the first four of so many rows, the others whole.
class Tiles {
  public:
    explicit Tiles(int rows = SIDE) {
        struct alignas(64) { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
        for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = uint8_t(i < 4 ? rows : SIDE);
        written();
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // What was stored before is in memory: the compiler does not know what loading a tile reads.
    static void written() { asm volatile("" ::: "memory"); }
};

inline long upward(long value, long step) { return (value + step - 1) / step; }

// m rows of `bytes` bytes as so many rows of tiles, zeros past the last row and byte. Tiles that are read together stand
// together, else they would meet in few places of the cache: (stretches, tall, stretch, 16 rows, 64 bytes).
inline Lines tiles_of(const void* rows, long m, long bytes, long tall, long stretch, int threads) {
    const long across = upward(bytes, 64);
    Lines lines(new Line[size_t(tall) * across * SIDE]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < tall * SIDE; ++i) {
        const uint8_t* row = (const uint8_t*)rows + i * bytes;
        for (long k = 0; k < across; ++k) {
            const long left = i < m ? std::min(64L, bytes - k * 64) : 0;
            const __mmask64 mask = left == 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
            const long first = k / stretch * stretch, steps = std::min(stretch, across - first);
            Line* const tile = &lines[(first * tall + i / SIDE * steps + k - first) * SIDE];
            _mm512_store_si512(tile + i % SIDE, _mm512_maskz_loadu_epi8(mask, row + k * 64));
        }
    }
    return lines;
}

// Four sums: of the upper two tiles of rows and the left column, the lower and the left, and both with the right.
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
inline void load_sums(const void* upper_left, const void* lower_left, const void* upper_right, const void* lower_right) {
    _tile_loadd(0, upper_left, 64);
    _tile_loadd(1, lower_left, 64);
    _tile_loadd(2, upper_right, 64);
    _tile_loadd(3, lower_right, 64);
}
inline void store_sums(void* upper_left, void* lower_left, void* upper_right, void* lower_right) {
    _tile_stored(0, upper_left, 64);
    _tile_stored(1, lower_left, 64);
    _tile_stored(2, upper_right, 64);
    _tile_stored(3, lower_right, 64);
}

// Add to them the products of two rows of tiles, the lower `below` lines after the upper, and two columns of a panel.
template <bool INTEGERS> void two_by_two(const Line* x, long below, const uint32_t* weights, Order order, int steps) {
    for (int k = 0; k < steps; ++k, x += SIDE, weights += SIDE * order.step) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, weights, order.step * 4);
        _tile_loadd(5, x + below, 64);
        _tile_loadd(7, weights + order.part, order.step * 4);
        if constexpr (INTEGERS) {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 5, 6);
            _tile_dpbusd(2, 4, 7);
            _tile_dpbusd(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

}  // namespace
