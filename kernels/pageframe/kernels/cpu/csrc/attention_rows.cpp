#include "attention_rows.h"

#include <limits>

#include "softmax.h"

namespace pf {
namespace {

// A register tile of kRows rows by kVectors vectors: as many sums as registers hold.
constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 4;
constexpr int kVectors = kLanes == 8 ? 4 : 2;
constexpr int kTileVectors = kTileKeys / kLanes;
static_assert(kTileVectors % kVectors == 0);

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// scores[i][lane] = query i * key of the lane: one chain over the channels each, in their order.
template <int rows>
PF_INLINE void score(const float* const* queries, const KvTile& tile, int64_t head_dim,
                     float (*scores)[kTileKeys]) {
    for (int at = 0; at < kTileKeys; at += kVectors * kLanes) {
        f32v sums[rows][kVectors] = {};
        const float* keys = tile.keys + at;
        for (int64_t channel = 0; channel < head_dim; channel++, keys += kTileKeys) {
            f32v query[rows];
            for (int i = 0; i < rows; i++) query[i] = splat(queries[i][channel]);
            for (int v = 0; v < kVectors; v++) {
                const f32v key = load(keys + v * kLanes);
                for (int i = 0; i < rows; i++) fma_into(sums[i][v], query[i], key);
            }
        }
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < kVectors; v++) store(scores[i] + at + v * kLanes, sums[i][v]);
    }
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
template <class Value, int rows, int vectors>
PF_INLINE void mix_in(float (*weights)[kTileKeys], const KvTile& tile, Lanes lanes, int64_t channel,
                      const f32v* corrections, float* mix, int64_t mix_stride) {
    f32v sums[rows][vectors];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++)
            sums[i][v] = load(mix + i * mix_stride + channel + v * kLanes) * corrections[i];
    for (int64_t lane = lanes.low; lane < lanes.high; lane++) {
        f32v weight[rows];
        for (int i = 0; i < rows; i++) weight[i] = splat(weights[i][lane]);
        const Value* values = static_cast<const Value*>(tile.values[lane]) + channel;
        for (int v = 0; v < vectors; v++) {
            const f32v value = load(values + v * kLanes);
            for (int i = 0; i < rows; i++) fma_into(sums[i][v], weight[i], value);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++)
            store(mix + i * mix_stride + channel + v * kLanes, sums[i][v]);
}

template <class Value, int rows>
void absorb_rows(const RowState& state, const float* const* queries, int64_t first,
                 const KvTile& tile, Lanes lanes, int64_t head_dim) {
    alignas(64) float scores[rows][kTileKeys];
    f32v corrections[rows];
    const int64_t mix_stride = padded_dim(head_dim);
    float* mix = state.mix + first * mix_stride;
    score<rows>(queries + first, tile, head_dim, scores);
    for (int i = 0; i < rows; i++)
        corrections[i] = weigh(scores[i], lanes, state.max + first + i,
                               state.sum + (first + i) * kLanes);
    int64_t channel = 0;
    for (; channel + kVectors * kLanes <= mix_stride; channel += kVectors * kLanes)
        mix_in<Value, rows, kVectors>(scores, tile, lanes, channel, corrections, mix, mix_stride);
    for (; channel < mix_stride; channel += kLanes)
        mix_in<Value, rows, 1>(scores, tile, lanes, channel, corrections, mix, mix_stride);
}

// The rows that are left when whole register tiles are done.
template <class Value, int rows>
void absorb_last(const RowState& state, const float* const* queries, int64_t first, int64_t count,
                 const KvTile& tile, Lanes lanes, int64_t head_dim) {
    if constexpr (rows > 0) {
        if (count == rows) return absorb_rows<Value, rows>(state, queries, first, tile, lanes, head_dim);
        absorb_last<Value, rows - 1>(state, queries, first, count, tile, lanes, head_dim);
    }
}

template <class Value>
void absorb_all(const RowState& state, const float* const* queries, int64_t first, int64_t count,
                const KvTile& tile, Lanes lanes, int64_t head_dim) {
    for (; count >= kRows; first += kRows, count -= kRows)
        absorb_rows<Value, kRows>(state, queries, first, tile, lanes, head_dim);
    absorb_last<Value, kRows - 1>(state, queries, first, count, tile, lanes, head_dim);
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

void absorb(const RowState& state, const float* const* queries, int64_t first, int64_t count,
            const KvTile& tile, Lanes lanes, int64_t head_dim) {
    const auto absorb_these = tile.has_bf16_values ? absorb_all<bf16> : absorb_all<float>;
    absorb_these(state, queries, first, count, tile, lanes, head_dim);
}

}  // namespace pf
