// A square of kLanes vectors, turned so that rows become lanes.
//
// First 4 x 4 squares inside each group of four lanes, by the unpacking every machine has; then
// whole groups of four change places, in one exchange for each doubling of the width.
#pragma once

#include "simd.h"

namespace pf {
namespace transposing {

// Lanes of a and b in turns, from the lower or the upper half of each four.
template <int upper>
struct Ones {
    static constexpr int of(int j) { return j / 4 * 4 + j % 4 / 2 + upper * 2 + j % 2 * kLanes; }
};

// The same with pairs of lanes.
template <int upper>
struct Twos {
    static constexpr int of(int j) { return j / 4 * 4 + j % 2 + upper * 2 + j % 4 / 2 * kLanes; }
};

// Groups of `size` lanes in turns, from the even or the odd groups of each.
template <int size, int odd>
struct Groups {
    static constexpr int of(int j) {
        const int from_b = j / size % 2;
        return from_b * kLanes + j - from_b * size + odd * size;
    }
};

PF_INLINE void fours(f32v* rows) {
    const f32v a = pick<Ones<0>>(rows[0], rows[1]), b = pick<Ones<1>>(rows[0], rows[1]);
    const f32v c = pick<Ones<0>>(rows[2], rows[3]), d = pick<Ones<1>>(rows[2], rows[3]);
    rows[0] = pick<Twos<0>>(a, c);
    rows[1] = pick<Twos<1>>(a, c);
    rows[2] = pick<Twos<0>>(b, d);
    rows[3] = pick<Twos<1>>(b, d);
}

template <int size>
PF_INLINE void exchange(f32v* rows) {
    if constexpr (size < kLanes) {
        for (int i = 0; i < kLanes; i++) {
            if (i & size) continue;
            const f32v a = rows[i], b = rows[i + size];
            rows[i] = pick<Groups<size, 0>>(a, b);
            rows[i + size] = pick<Groups<size, 1>>(a, b);
        }
        exchange<2 * size>(rows);
    }
}

}  // namespace transposing

// rows[i][j] becomes rows[j][i].
PF_INLINE void transpose(f32v (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; i += 4) transposing::fours(rows + i);
    transposing::exchange<4>(rows);
}

}  // namespace pf
