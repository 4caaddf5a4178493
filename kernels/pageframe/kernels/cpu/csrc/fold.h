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
#include "transpose.h"

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

}  // namespace folding

// Of four vectors: lane 4 g + k is the sum of lanes [4 g, 4 g + 4) of vector k.
PF_INLINE f32v fold_fours(f32v a, f32v b, f32v c, f32v d) {
    return folding::add_neighbours(folding::add_neighbours(a, b), folding::add_neighbours(c, d));
}

// Of what `fold_fours` made, four vectors at a time, of as many vectors as there are lanes: lane k is
// the sum of all lanes of vector k.
template <int size = 4, int num>
PF_INLINE f32v fold_groups(const f32v (&fours)[num]) {
    static_assert(size * num == kLanes);
    if constexpr (num == 1) {
        return fours[0];
    } else {
        f32v sums[num / 2];
        times<num / 2>([&](auto i) PF_EACH {
            const f32v a = fours[2 * i], b = fours[2 * i + 1];
            sums[i] = transposing::pick<transposing::Groups<size, 0>>(a, b) +
                      transposing::pick<transposing::Groups<size, 1>>(a, b);
        });
        return fold_groups<2 * size>(sums);
    }
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
