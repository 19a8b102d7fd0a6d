// Numbers that are float32 or bfloat16, sixteen at a time.
#pragma once
#include <algorithm>

#include "vectors.h"

// Numbers in either width. Mirrored by `Some` in library.py.
struct Some {
    void* data;
    int32_t narrow;  // bfloat16
};

inline float number(float value) { return value; }
inline float number(bf16 value) { return widen(value); }
template <typename T> T numbered(float value);
template <> inline float numbered(float value) { return value; }
template <> inline bf16 numbered(float value) { return narrow(value); }

constexpr long ENOUGH = 1 << 14;  // numbers that are worth another thread

inline int worth(long numbers, int threads) { return int(std::clamp(numbers / ENOUGH, 1L, long(threads))); }

// Calls f with pointers of the types that the tensors have.
template <typename F> void typed(F f) { f(); }
template <typename F, typename... Rest> void typed(F f, Some first, Rest... rest) {
    if (first.narrow) typed([&](auto... others) { f((bf16*)first.data, others...); }, rest...);
    else typed([&](auto... others) { f((float*)first.data, others...); }, rest...);
}

// Calls f with the start of each 16 numbers, and which of them count.
template <typename F> inline void each(long count, F f) {
    long k = 0;
    for (; k + 16 <= count; k += 16) f(k, lanes(16));
    if (k < count) f(k, lanes(count - k));
}
