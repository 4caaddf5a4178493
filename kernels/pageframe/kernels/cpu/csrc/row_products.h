// Products of a few query rows with keys and values where they lie in the arena.
//
// A lane is a word of channels here (kv_words.h), and each score is the fold (fold.h) of one vector of
// sums. Queries and mixes have their channels by parts. As many sums are under way as registers hold:
// what was loaded for one part must not be kept for the next.
#pragma once

#include <algorithm>

#include "fold.h"
#include "kv_tile.h"
#include "kv_words.h"
#include "simd.h"

namespace pf {

// Rows of a register tile, and keys whose scores are under way together: twelve sums, enough to hide
// the latency of a fused multiply-add.
inline constexpr int kRowsInPlace = 3;
inline constexpr int kKeysInPlace = 4;
static_assert(kLanes % kKeysInPlace == 0);
// Vectors of a mix that are under way together: again twelve sums.
inline constexpr int kVectorsInPlace = 4;

// The compiler takes `place` for a new one, and loads again what it loaded there.
template <class Place>
PF_INLINE void forget(Place& place) {
    asm volatile("" : "+r"(place));
}

// scores[i][lane] = query i * key of the lane, at least for lanes [low, high).
template <class T, int rows>
PF_INLINE void score_in_place(const float* const* queries, KvTile& tile, int64_t low, int64_t high,
                              int64_t head_dim, float (*scores)[kTileKeys]) {
    // Scores are stored a vector at a time: parts of one would have to reach memory before the vector
    // could be loaded.
    constexpr int kFours = kLanes / kKeysInPlace;
    // Half of those that the words of so many keys lie in; of the rest while nothing else is read.
    constexpr int kLines = std::max<int>(1, kKeysInPlace * 4 * kLanes / kLineBytes / 2);
    const uint8_t** lines = tile.lines_to_ask();
    for (int64_t lane = low / kLanes * kLanes; lane < high; lane += kLanes) {
        f32v fours[rows][kFours];
        for (int64_t four = 0; four < kFours; four++) {
            forget(four);  // not to be unrolled: the second four would find no registers
            f32v sums[rows][kKeysInPlace];
            const uint8_t* keys[kKeysInPlace];
            times<kKeysInPlace>([&](auto k) PF_EACH {
                keys[k] = tile.key_row(lane + four * kKeysInPlace + k);
                times<rows>([&](auto i) PF_EACH { sums[i][k] = f32v{}; });
            });
            int64_t byte = 0;
            for (int64_t at = 0; at < head_dim; at += kPerWord<T> * kLanes, byte += 4 * kLanes) {
                times<kPerWord<T>>([&](auto part) PF_EACH {
                    f32v query[rows];
                    times<rows>(
                        [&](auto i) PF_EACH { query[i] = load(queries[i] + at + part * kLanes); });
                    times<kKeysInPlace>([&](auto k) PF_EACH {
                        const f32v key = load_channel<T>(keys[k] + byte, part);
                        times<rows>([&](auto i) PF_EACH { fma_into(sums[i][k], query[i], key); });
                    });
                    forget(byte);
                });
                ask<kLines>(lines);
            }
            times<rows>([&](auto i) PF_EACH {
                fours[i][four] = fold_fours(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
            });
        }
        times<rows>([&](auto i) PF_EACH { store(scores[i] + lane, fold_groups(fours[i])); });
    }
    tile.asking = lines;
}

// mix[i] = mix[i] * corrections[i] + weights[i] * values of lanes [low, high), for `vectors` vectors
// from `channel` on: one chain over the lanes for each channel.
template <class T, int rows, int vectors>
PF_INLINE void mix_in_place(float (*weights)[kTileKeys], KvTile& tile, int64_t low, int64_t high,
                            int64_t channel, const f32v* corrections, float* mix,
                            int64_t mix_stride) {
    constexpr int kParts = kPerWord<T>;
    const uint8_t** lines = tile.lines_to_ask();
    // As many as a lane's channels lie in.
    constexpr int kLines = std::max<int>(1, vectors / kParts * 4 * kLanes / kLineBytes);
    f32v sums[rows][vectors];
    const auto place = [&](int i, int v) PF_EACH { return mix + i * mix_stride + channel + v * kLanes; };
    times<rows>([&](auto i) PF_EACH {
        times<vectors>([&](auto v) PF_EACH { sums[i][v] = load(place(i, v)) * corrections[i]; });
    });
    const int64_t offset = tile.value_offset + channel * static_cast<int>(sizeof(T));
    for (int64_t lane = low; lane < high; lane++) {
        f32v weight[rows];
        times<rows>([&](auto i) PF_EACH { weight[i] = splat(weights[i][lane]); });
        const uint8_t* values = tile.tokens[lane] + offset;
        times<vectors>([&](auto v) PF_EACH {
            const f32v value = load_channel<T>(values + v / kParts * 4 * kLanes, v % kParts);
            times<rows>([&](auto i) PF_EACH { fma_into(sums[i][v], weight[i], value); });
            forget(values);
        });
        ask<kLines>(lines);
    }
    tile.asking = lines;
    times<rows>([&](auto i) PF_EACH {
        times<vectors>([&](auto v) PF_EACH { store(place(i, v), sums[i][v]); });
    });
}

}  // namespace pf
