// Sums over the lanes of several vectors at once.
//
// One order for all: neighbours first, then neighbours of those,
//
//     ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)) ..
//
// so that `FoldStack`, which is given whole vectors of what are lanes elsewhere, adds up the same.
#pragma once

#include <bit>
#include <utility>

#include "simd.h"

namespace pf {
namespace folding {

// Sums of neighbours: those of a and of b in turns, two of each in every four lanes.
template <int... j>
PF_INLINE f32v add_neighbours(f32v a, f32v b, std::integer_sequence<int, j...>) {
    constexpr auto even = [](int lane) {
        return lane / 4 * 4 + lane % 2 * 2 + lane % 4 / 2 * kLanes;
    };
    const f32v first = __builtin_shufflevector(a, b, even(j)...);
    const f32v second = __builtin_shufflevector(a, b, (even(j) + 1)...);
    return first + second;
}

PF_INLINE f32v add_neighbours(f32v a, f32v b) {
    return add_neighbours(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <int distance, int... j>
PF_INLINE f32v add_crossing(f32v v, std::integer_sequence<int, j...>) {
    return v + __builtin_shufflevector(v, v, (j ^ distance)...);
}

template <int distance>
PF_INLINE f32v add_groups(f32v v) {
    if constexpr (distance >= kLanes)
        return v;
    else
        return add_groups<2 * distance>(
            add_crossing<distance>(v, std::make_integer_sequence<int, kLanes>{}));
}

}  // namespace folding

// to[0 .. 3] = the sums of the lanes of a, b, c, d.
PF_INLINE void fold_four(f32v a, f32v b, f32v c, f32v d, float* to) {
    const f32v pairs = folding::add_neighbours(a, b);
    const f32v others = folding::add_neighbours(c, d);
    store_first(to, folding::add_groups<4>(folding::add_neighbours(pairs, others)), 4);
}

// Takes kLanes blocks of vectors, in order, and adds them up as lanes are folded. As a binary counter
// has its carries: what is on a level waits for its neighbour.
template <int rows, int vectors>
class FoldStack {
public:
    using Block = f32v[rows][vectors];

    // Block `index`; the last one, kLanes - 1, comes back as the sum of all.
    PF_INLINE void push(int index, Block& block) {
        int level = 0;
        for (; index >> level & 1; level++)
            each([&](auto i, auto v) PF_EACH { block[i][v] = waiting_[level][i][v] + block[i][v]; });
        if (level == kLevels) return;
        each([&](auto i, auto v) PF_EACH { waiting_[level][i][v] = block[i][v]; });
    }

private:
    template <class Body>
    static PF_INLINE void each(Body&& body) {
        times<rows>([&](auto i) PF_EACH { times<vectors>([&](auto v) PF_EACH { body(i, v); }); });
    }

    static constexpr int kLevels = std::countr_zero(static_cast<unsigned>(kLanes));

    Block waiting_[kLevels];
};

}  // namespace pf
