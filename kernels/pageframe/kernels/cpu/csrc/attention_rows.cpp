#include "attention_rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "fold.h"
#include "kv_words.h"
#include "row_products.h"
#include "softmax.h"

namespace pf {
namespace {

// A register tile of kRows rows by kVectors vectors: as many sums as registers hold.
constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 4;
constexpr int kVectors = kLanes == 8 ? 4 : 2;
constexpr int kTileVectors = kTileKeys / kLanes;
static_assert(kTileVectors % kVectors == 0);

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// scores[i][lane] = query i * key of the lane. Of each class of words that share a lane in
// row_products.h one chain over the channels, in their order; the classes are folded.
template <int rows, int per_word>
PF_INLINE void score(const float* const* queries, KvTile& tile, int64_t head_dim,
                     float (*scores)[kTileKeys]) {
    for (int at = 0; at < kTileKeys; at += kVectors * kLanes) {
        FoldStack<rows, kVectors> stack;
        f32v sums[rows][kVectors];
        for (int word = 0; word < kLanes; word++) {
            times<rows>([&](auto i) PF_EACH {
                times<kVectors>([&](auto v) PF_EACH { sums[i][v] = f32v{}; });
            });
            for (int64_t first = word * per_word; first < head_dim; first += kLanes * per_word)
                times<per_word>([&](auto part) PF_EACH {
                    const float* keys = tile.keys + (first + part) * kTileKeys + at;
                    f32v query[rows];
                    times<rows>([&](auto i) PF_EACH { query[i] = splat(queries[i][first + part]); });
                    times<kVectors>([&](auto v) PF_EACH {
                        const f32v key = load(keys + v * kLanes);
                        times<rows>([&](auto i) PF_EACH { fma_into(sums[i][v], query[i], key); });
                    });
                });
            stack.push(word, sums);
            tile.ask();
        }
        times<rows>([&](auto i) PF_EACH {
            times<kVectors>([&](auto v) PF_EACH { store(scores[i] + at + v * kLanes, sums[i][v]); });
        });
    }
}

// As many floats as a tile has lanes, each multiplied by its lane's.
PF_INLINE void scale_lanes(float* row, const float* scales) {
    for (int64_t lane = 0; lane < kTileKeys; lane += kLanes)
        store(row + lane, load(row + lane) * load(scales + lane));
}

// Lanes outside [low, high) become `value`.
PF_INLINE void fill_outside(float* row, Lanes lanes, float value) {
    for (int64_t lane = 0; lane < lanes.low; lane++) row[lane] = value;
    for (int64_t lane = lanes.high; lane < kTileKeys; lane++) row[lane] = value;
}

// The largest of the scores, in every lane.
PF_INLINE f32v row_max(const float* row) {
    f32v most = load(row);
    for (int v = 1; v < kTileVectors; v++) most = max(most, load(row + v * kLanes));
    return max_everywhere(most);
}

// Scores become weights e^(score - max); max and sum go on. Returns what all that the row has so far
// is to be multiplied by.
PF_INLINE f32v weigh(float* scores, Lanes lanes, float* most, float* sums) {
    const bool is_part = lanes.high - lanes.low < kTileKeys;
    if (is_part) fill_outside(scores, lanes, kMinusInfinity);
    const f32v old_max = splat(*most);
    const f32v new_max = max(old_max, row_max(scores));
    // Mostly the maximum stays; e^0 is 1, so the shorter way gives the same.
    const bool stays = new_max[0] == *most;
    const f32v correction = stays ? splat(1.0f) : exp_below_one(old_max - new_max);
    *most = new_max[0];
    f32v weights[kTileVectors];
    for (int v = 0; v < kTileVectors; v++) {
        weights[v] = exp_below_one(load(scores + v * kLanes) - new_max);
        store(scores + v * kLanes, weights[v]);
    }
    f32v sum = load(sums) * correction;
    if (is_part) {
        fill_outside(scores, lanes, 0.0f);
        for (int v = 0; v < kTileVectors; v++) weights[v] = load(scores + v * kLanes);
    }
    for (int v = 0; v < kTileVectors; v++) sum += weights[v];
    store(sums, sum);
    return correction;
}

// mix = mix * correction + weights * values, one chain over the lanes for each channel.
template <int rows, int vectors>
PF_INLINE void mix_in(float (*weights)[kTileKeys], const KvTile& tile, Lanes lanes, int64_t channel,
                      const f32v* corrections, float* mix, int64_t mix_stride) {
    f32v sums[rows][vectors];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++)
            sums[i][v] = load(mix + i * mix_stride + channel + v * kLanes) * corrections[i];
    for (int64_t lane = lanes.low; lane < lanes.high; lane++) {
        f32v weight[rows];
        for (int i = 0; i < rows; i++) weight[i] = splat(weights[i][lane]);
        const float* values = tile.values[lane] + channel;
        for (int v = 0; v < vectors; v++) {
            const f32v value = load(values + v * kLanes);
            for (int i = 0; i < rows; i++) fma_into(sums[i][v], weight[i], value);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++)
            store(mix + i * mix_stride + channel + v * kLanes, sums[i][v]);
}

// How one kind of tile is used: keys and values of type T, in place or brought along.
template <class T>
struct InPlace {
    static constexpr int kMaxRows = kRowsInPlace;
    static constexpr int kVectors = std::max(kVectorsInPlace, kPerWord<T>);
    static constexpr int kLastVectors = kPerWord<T>;

    template <int rows>
    static PF_INLINE void score(const float* const* queries, KvTile& tile, Lanes lanes,
                                int64_t head_dim, float (*scores)[kTileKeys]) {
        score_in_place<T, rows>(queries, tile, lanes.low, lanes.high, head_dim, scores);
    }
    template <int rows, int vectors>
    static PF_INLINE void mix(float (*weights)[kTileKeys], KvTile& tile, Lanes lanes,
                              int64_t channel, const f32v* corrections, float* mix, int64_t stride) {
        mix_in_place<T, rows, vectors>(weights, tile, lanes.low, lanes.high, channel, corrections,
                                       mix, stride);
    }
};

template <class T>
struct Brought {
    static constexpr int kMaxRows = kRows;
    static constexpr int kVectors = pf::kVectors;
    static constexpr int kLastVectors = 1;

    template <int rows>
    static PF_INLINE void score(const float* const* queries, KvTile& tile, Lanes, int64_t head_dim,
                                float (*scores)[kTileKeys]) {
        pf::score<rows, kPerWord<T>>(queries, tile, head_dim, scores);
    }
    template <int rows, int vectors>
    static PF_INLINE void mix(float (*weights)[kTileKeys], KvTile& tile, Lanes lanes,
                              int64_t channel, const f32v* corrections, float* mix, int64_t stride) {
        mix_in<rows, vectors>(weights, tile, lanes, channel, corrections, mix, stride);
    }
};

template <class Use, bool is_scaled, int rows>
void absorb_rows(const RowState& state, const float* const* queries, int64_t first, KvTile& tile,
                 Lanes lanes, int64_t head_dim) {
    alignas(64) float scores[rows][kTileKeys];
    f32v corrections[rows];
    const int64_t mix_stride = padded_dim(head_dim);
    float* mix = state.mix + first * mix_stride;
    Use::template score<rows>(queries + first, tile, lanes, head_dim, scores);
    for (int i = 0; i < rows; i++) {
        if (is_scaled) scale_lanes(scores[i], tile.key_scales);
        corrections[i] = weigh(scores[i], lanes, state.max + first + i,
                               state.sum + (first + i) * kLanes);
        if (is_scaled) scale_lanes(scores[i], tile.value_scales);
    }
    int64_t channel = 0;
    for (; channel + Use::kVectors * kLanes <= mix_stride; channel += Use::kVectors * kLanes)
        Use::template mix<rows, Use::kVectors>(scores, tile, lanes, channel, corrections, mix,
                                               mix_stride);
    for (; channel < mix_stride; channel += Use::kLastVectors * kLanes)
        Use::template mix<rows, Use::kLastVectors>(scores, tile, lanes, channel, corrections, mix,
                                                   mix_stride);
}

// Whole register tiles, then the rows that are left.
template <class Use, bool is_scaled, int rows>
void absorb_all(const RowState& state, const float* const* queries, int64_t first, int64_t count,
                KvTile& tile, Lanes lanes, int64_t head_dim) {
    if constexpr (rows > 0) {
        for (; count >= rows; first += rows, count -= rows)
            absorb_rows<Use, is_scaled, rows>(state, queries, first, tile, lanes, head_dim);
        absorb_all<Use, is_scaled, rows - 1>(state, queries, first, count, tile, lanes, head_dim);
    }
}

}  // namespace

void RowState::place(float* memory, int64_t num_rows) {
    max = memory;
    sum = max + num_rows;
    mix = sum + num_rows * kLanes;
}

void RowState::clear(int64_t num_rows, int64_t head_dim) {
    for (int64_t i = 0; i < num_rows; i++) max[i] = kMinusInfinity;
    for (int64_t i = 0; i < num_rows * kLanes; i++) sum[i] = 0.0f;
    for (int64_t i = 0; i < num_rows * padded_dim(head_dim); i++) mix[i] = 0.0f;
}

void RowState::order_by_channels(int64_t first, int64_t num_rows, int64_t head_dim, int32_t dtype) {
    float* rows = mix + first * padded_dim(head_dim);
    const int64_t count = num_rows * padded_dim(head_dim);
    if (dtype == PF_BF16) pf::order_by_channels<bf16>(rows, count, rows);
    if (dtype == PF_INT8) pf::order_by_channels<int8_t>(rows, count, rows);
}

void RowState::order_by_parts(int64_t first, int64_t num_rows, int64_t head_dim, int32_t dtype) {
    float* rows = mix + first * padded_dim(head_dim);
    const int64_t count = num_rows * padded_dim(head_dim);
    if (dtype == PF_BF16) pf::order_by_parts<bf16>(rows, count, rows);
    if (dtype == PF_INT8) pf::order_by_parts<int8_t>(rows, count, rows);
}

void RowState::copy(int64_t first, const RowState& from, int64_t from_first, int64_t num_rows,
                    int64_t head_dim) {
    const auto take = [=](float* to, const float* rows, int64_t row_floats) {
        std::memcpy(to + first * row_floats, rows + from_first * row_floats,
                    sizeof(float) * static_cast<size_t>(num_rows * row_floats));
    };
    take(max, from.max, 1);
    take(sum, from.sum, kLanes);
    take(mix, from.mix, padded_dim(head_dim));
}

const float* place_query(const float* query, int64_t head_dim, int32_t dtype, bool is_in_place,
                         float* copy) {
    if (!is_in_place || !has_parts(dtype)) return query;
    if (dtype == PF_BF16) order_by_parts<bf16>(query, head_dim, copy);
    if (dtype == PF_INT8) order_by_parts<int8_t>(query, head_dim, copy);
    return copy;
}

int64_t num_asks(int64_t num_rows, int64_t head_dim, bool is_in_place) {
    const auto num_tiles = [=](int64_t rows) { return (num_rows + rows - 1) / rows; };
    if (!is_in_place) return num_tiles(kRows) * (kTileKeys / kVectors);
    // For each few keys once, and for their values as often as a mix is walked through.
    constexpr int64_t kFloats = kVectorsInPlace * kLanes;
    const int64_t num_walks = 1 + (padded_dim(head_dim) + kFloats - 1) / kFloats;
    return num_tiles(kRowsInPlace) * num_walks * (kTileKeys / kKeysInPlace);
}

void absorb(const RowState& state, const float* const* queries, int64_t first, int64_t count,
            KvTile& tile, Lanes lanes, int64_t head_dim) {
    const auto use = [&]<class T>(T) {
        constexpr bool is_scaled = sizeof(T) == 1;
        const auto absorb_these = tile.is_in_place
                                      ? absorb_all<InPlace<T>, is_scaled, InPlace<T>::kMaxRows>
                                      : absorb_all<Brought<T>, is_scaled, Brought<T>::kMaxRows>;
        absorb_these(state, queries, first, count, tile, lanes, head_dim);
    };
    switch (tile.dtype) {
        case PF_F32: return use(float{});
        case PF_BF16: return use(bf16{});
        case PF_INT8: return use(int8_t{});
    }
}

}  // namespace pf
