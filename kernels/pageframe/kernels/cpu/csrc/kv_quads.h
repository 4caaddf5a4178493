// int8 keys and values in whole numbers, for machines that multiply four pairs of bytes and add up the
// products in one instruction.
//
// A query has two bytes for each channel, a weight two for each key: a step times (256 * high + low),
// which is finer than bf16. Nothing is widened, and sums of whole numbers are the same in any order,
// however many rows share a tile. The instruction takes one factor as unsigned: keys, 128 added to each
// channel, and weights.
//
// Sixteen rows of 64 channels, a vector each, are turned within their 128-bit groups only, which takes
// half of the moves of turning them whole. G is such a group, w a word in it:
//
//     keys    vector [g][j]   G, w: channels 4 (4 G + j) .. + 3 of key 4 g + w     sums: added up over G
//     values  vector [g][v]   G, w: channel 16 G + 4 v + w of values 4 g .. + 3    sums: turned back
#pragma once

#include <cstdint>

#include "pageframe_cpu.h"
#include "simd.h"
#include "transpose.h"

namespace pf {

inline constexpr int64_t kQuadChannels = 64;  // of a vector
inline constexpr int kQuadGroups = 4;         // of 128 bits in a vector, of four keys in a tile

// Whether keys and values of a type are used in whole numbers: whole vectors, and so few of them that
// 32 bits hold a score.
inline bool has_quads(int32_t dtype, int64_t head_dim) {
    return kHasQuads && dtype == PF_INT8 && head_dim % kQuadChannels == 0 && head_dim <= 4 * kQuadChannels;
}

#ifdef PF_QUADS

namespace quads {

typedef uint8_t bytes __attribute__((vector_size(4 * kLanes)));

// Runs of `size` bytes of a and b in turns, from the lower or the upper half of each 16.
template <int size, int upper>
struct InTurns {
    static constexpr int of(int j) {
        const int run = j % 16 / size;
        return j / 16 * 16 + upper * 8 + run / 2 * size + j % size + run % 2 * 4 * kLanes;
    }
};

// Groups of four lanes: the even or the odd ones of a, then those of b.
template <int odd>
struct EverySecond {
    static constexpr int of(int j) {
        const int group = j / 4;
        return (group / 2) * kLanes + (group % 2 * 2 + odd) * 4 + j % 4;
    }
};
// Groups of a, then of b, each with its neighbour.
PF_INLINE i32v add_neighbours(i32v a, i32v b) { return pick<EverySecond<0>>(a, b) + pick<EverySecond<1>>(a, b); }
PF_INLINE f32v max_neighbours(f32v a, f32v b) { return max(pick<EverySecond<0>>(a, b), pick<EverySecond<1>>(a, b)); }

template <int group>
struct OneGroup {
    static constexpr int of(int j) { return group * 4 + j % 4; }
};
struct ToGroups {
    static constexpr int of(int j) { return j / 4; }
};
template <int word>
struct WordOfGroup {
    static constexpr int of(int j) { return j / 4 * 4 + word; }
};

}  // namespace quads

// One word of each group, in all of the group.
template <int word>
PF_INLINE u32v splat_within(u32v v) {
    return pick<quads::WordOfGroup<word>>(v);
}

// Four vectors become one, whose group i is the sum of all groups of the i-th.
PF_INLINE i32v add_groups(i32v (&v)[kQuadGroups]) {
    return quads::add_neighbours(quads::add_neighbours(v[0], v[1]), quads::add_neighbours(v[2], v[3]));
}

// Four vectors become one, whose group i has the largest lane of the i-th in all lanes.
PF_INLINE f32v max_groups(f32v (&v)[kQuadGroups]) {
    f32v most = quads::max_neighbours(quads::max_neighbours(v[0], v[1]), quads::max_neighbours(v[2], v[3]));
    most = max(most, pick<Swapped<2>>(most));
    return max(most, pick<Swapped<1>>(most));
}

// One group, in all groups.
template <int group>
PF_INLINE f32v splat_group(f32v v) {
    return pick<quads::OneGroup<group>>(v);
}

// Lane i, in all of group i.
PF_INLINE f32v spread_to_groups(f32v v) {
    return pick<quads::ToGroups>(v);
}

// Group i of vector j becomes group j of vector i.
PF_INLINE void turn_groups(i32v (&v)[kQuadGroups]) {
    const i32v a = pick<quads::EverySecond<0>>(v[0], v[1]), b = pick<quads::EverySecond<0>>(v[2], v[3]);
    const i32v c = pick<quads::EverySecond<1>>(v[0], v[1]), d = pick<quads::EverySecond<1>>(v[2], v[3]);
    v[0] = pick<quads::EverySecond<0>>(a, b);
    v[1] = pick<quads::EverySecond<0>>(c, d);
    v[2] = pick<quads::EverySecond<1>>(a, b);
    v[3] = pick<quads::EverySecond<1>>(c, d);
}

// Four rows of keys, as above, unsigned.
PF_INLINE void turn_quad_keys(const uint8_t* const* rows, int64_t offset, u32v (&keys)[4]) {
    f32v square[4];
    times<4>([&](auto i) PF_EACH {
        square[i] = (f32v)(load_as<u32v>(rows[i] + offset) ^ 0x80808080u);
    });
    transposing::fours(square);
    times<4>([&](auto i) PF_EACH { keys[i] = (u32v)square[i]; });
}

// Four rows of values, as above.
PF_INLINE void turn_quad_values(const uint8_t* const* rows, int64_t offset, u32v (&values)[4]) {
    using quads::bytes, quads::InTurns;
    bytes row[4];
    times<4>([&](auto i) PF_EACH { row[i] = load_as<bytes>(rows[i] + offset); });
    times<2>([&](auto upper) PF_EACH {
        const bytes first = pick<InTurns<1, upper>>(row[0], row[1]);
        const bytes second = pick<InTurns<1, upper>>(row[2], row[3]);
        values[2 * upper] = (u32v)pick<InTurns<2, 0>>(first, second);
        values[2 * upper + 1] = (u32v)pick<InTurns<2, 1>>(first, second);
    });
}

#endif

}  // namespace pf
