// Products of a few query rows with keys and values where they lie in the arena.
//
// Keys are turned in registers, so that a lane is a position there too; in a mix a lane is a word of
// channels (kv_words.h), and mixes have their channels by parts where words are widened. As many sums are
// under way as registers hold: what was loaded for one part must not be kept for the next.
#pragma once

#include <algorithm>

#include "kv_forms.h"
#include "kv_tile.h"
#include "simd.h"
#include "transpose.h"

namespace pf {

// Rows of a register tile.
inline constexpr int kRowsInPlace = 3;
// Vectors of a mix that are under way together: twelve sums, enough to hide the latency of a fused
// multiply-add.
inline constexpr int kVectorsInPlace = 4;

// The compiler takes `place` for a new one, and loads again what it loaded there.
template <class Place>
PF_INLINE void forget(Place& place) {
    asm volatile("" : "+r"(place));
}

// scores[i][lane] = query i * key of the lane, at least for lanes [low, high). Keys are turned a square
// of words at a time; the chains of a score follow kv_forms.h.
template <class Form, int rows>
PF_INLINE void score_in_place(const float* queries, int64_t query_stride, KvTile& tile, int64_t low,
                              int64_t high, int64_t key_bytes, float (*scores)[kTileKeys]) {
    constexpr int kWordBytes = 4, kParts = Form::kKeyParts;
    // As many as a square lies in.
    constexpr int kLines = std::max<int>(1, kWordBytes * kLanes * kLanes / kLineBytes);
    const uint8_t** lines = tile.lines_to_ask();
    for (int64_t lane = low / kLanes * kLanes; lane < high; lane += kLanes) {
        f32v totals[rows];
        times<rows>([&](auto i) PF_EACH { totals[i] = f32v{}; });
        for (int64_t byte = 0; byte < key_bytes; byte += kWordBytes * kLanes) {
            f32v square[kLanes];
            times<kLanes>([&](auto i) PF_EACH {
                square[i] = load_as<f32v>(tile.key_row(lane + i) + byte);
            });
            transpose(square);
            f32v sums[rows];
            times<rows>([&](auto i) PF_EACH { sums[i] = f32v{}; });
            const int64_t first = byte / kWordBytes * kParts;
            times<kLanes>([&](auto word) PF_EACH {
                times<kParts>([&](auto part) PF_EACH {
                    const f32v key = Form::key(square[word], part);
                    times<rows>([&](auto i) PF_EACH {
                        Form::add(sums[i], Form::splat(queries + i * query_stride + first + word * kParts + part),
                                  key);
                    });
                });
                if constexpr (word % (kLanes / kLines) == 0) ask<1>(lines);
            });
            times<rows>([&](auto i) PF_EACH { totals[i] += sums[i]; });
        }
        times<rows>([&](auto i) PF_EACH { store(scores[i] + lane, totals[i]); });
    }
    tile.asking = lines;
}

// mix[i] = mix[i] * corrections[i] + weights[i] * values of lanes [low, high), for `vectors` vectors
// from `channel` on: one chain over the lanes for each channel.
template <class Form, int rows, int vectors>
PF_INLINE void mix_in_place(float (*weights)[kTileKeys], KvTile& tile, int64_t low, int64_t high,
                            int64_t channel, const f32v* corrections, float* mix,
                            int64_t mix_stride) {
    constexpr int kParts = Form::kValueParts, kLanesAtOnce = Form::kStepLanes;
    const uint8_t** lines = tile.lines_to_ask();
    // As many as a step's channels lie in.
    constexpr int kLines =
        std::max<int>(1, vectors / kParts * kLanesAtOnce * 4 * kLanes / kLineBytes);
    f32v sums[rows][vectors];
    const auto place = [&](int i, int v) PF_EACH { return mix + i * mix_stride + channel + v * kLanes; };
    times<rows>([&](auto i) PF_EACH {
        times<vectors>([&](auto v) PF_EACH { sums[i][v] = load(place(i, v)) * corrections[i]; });
    });
    int64_t offset = tile.value_offset + channel / kParts * 4;
    for_steps<Form>(low, high, [&](int64_t step, auto seen) PF_EACH {
        f32v weight[rows];
        times<rows>([&](auto i) PF_EACH { weight[i] = Form::splat(weights[i] + step); });
        const uint8_t* const* values = tile.tokens + step * kLanesAtOnce;
        times<vectors>([&](auto v) PF_EACH {
            const f32v value = seen(Form::value(values, offset, v));
            times<rows>([&](auto i) PF_EACH { Form::add(sums[i][v], weight[i], value); });
            forget(offset);
        });
        ask<kLines>(lines);
    });
    tile.asking = lines;
    times<rows>([&](auto i) PF_EACH {
        times<vectors>([&](auto v) PF_EACH { store(place(i, v), sums[i][v]); });
    });
}

}  // namespace pf
