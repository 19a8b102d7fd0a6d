// How the heads of a block attend.
#pragma once
#include "vectors.h"

// Mirrored by `Heads` in library.py.
struct Heads {
    int32_t heads, shared, size, turning;  // of queries; of keys and values; numbers of each; of these, that turn
    float scale, cap;                      // of scores, which are bent into -cap .. cap; 0: they are not
    int32_t coarse, room;                  // coarse: scores are rounded to bfloat16
    const float* bias;                     // (heads, room), added to scores by the places of what is seen; or null
};
