#include "attention_rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention_quads.h"
#include "kv_forms.h"
#include "row_products.h"
#include "softmax.h"

namespace pf {
namespace {

// Register tiles of kRows rows by kVectors vectors of keys, or kMixVectors of channels: as many sums as
// registers hold beside what is multiplied.
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 3 : 4;
constexpr int kVectors = kLanes == 16 ? 1 : kLanes == 8 ? 4 : 2;
constexpr int kMixVectors = kLanes == 8 ? 4 : 2;
constexpr int kTileVectors = kTileKeys / kLanes;
static_assert(kTileVectors % kVectors == 0);

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// sums[i][v] += row_of(i) * vector_of(v). Registers hold the factors of whichever side has fewer, and
// one of the other.
template <class Form, int rows, int vectors, class RowOf, class VectorOf>
PF_INLINE void add_products(RowOf&& row_of, VectorOf&& vector_of, f32v (&sums)[rows][vectors]) {
    if constexpr (rows >= vectors) {
        f32v held[vectors];
        times<vectors>([&](auto v) PF_EACH { held[v] = vector_of(v); });
        times<rows>([&](auto i) PF_EACH {
            const f32v row = row_of(i);
            times<vectors>([&](auto v) PF_EACH { Form::add(sums[i][v], row, held[v]); });
        });
    } else {
        f32v held[rows];
        times<rows>([&](auto i) PF_EACH { held[i] = row_of(i); });
        times<vectors>([&](auto v) PF_EACH {
            const f32v vector = vector_of(v);
            times<rows>([&](auto i) PF_EACH { Form::add(sums[i][v], held[i], vector); });
        });
    }
}

// scores[i][lane] = query i * key of the lane, in the order of kv_forms.h. `num_factors`: of a query.
template <class Form, int rows>
PF_INLINE void score(const float* queries, int64_t query_stride, KvTile& tile, int64_t num_factors,
                     float (*scores)[kTileKeys]) {
    constexpr int64_t kGroup = kLanes * Form::kKeyParts;
    for (int at = 0; at < kTileKeys; at += kVectors * kLanes) {
        const auto place = [&](int i, int v) PF_EACH { return scores[i] + at + v * kLanes; };
        for (int64_t group = 0; group < num_factors; group += kGroup) {
            f32v sums[rows][kVectors];
            times<rows>([&](auto i) PF_EACH {
                times<kVectors>([&](auto v) PF_EACH { sums[i][v] = f32v{}; });
            });
            const int64_t end = std::min(group + kGroup, num_factors);
            for (int64_t factor = group; factor < end; factor++) {
                const float* keys = tile.keys + factor * kTileKeys + at;
                add_products<Form>([&](int i) PF_EACH { return Form::splat(queries + i * query_stride + factor); },
                                   [&](int v) PF_EACH { return load(keys + v * kLanes); }, sums);
            }
            times<rows>([&](auto i) PF_EACH {
                times<kVectors>([&](auto v) PF_EACH {
                    const f32v before = group == 0 ? f32v{} : load(place(i, v));
                    store(place(i, v), before + sums[i][v]);
                });
            });
            tile.ask_some();
        }
    }
}

// Scores of some rows become weights e^(score - max); max and sum go on. `corrections` are what all
// that a row has so far is to be multiplied by. With `is_scaled` scores and weights are multiplied by
// their lane's scales, sums are not. Twice for each row `num_lines` are asked for.
//
// Nothing waits for a branch, and rows do not wait for each other. Where the maximum stays, which it
// mostly does, the correction is e^0, exactly 1.
template <class Form, bool is_scaled, int num_lines, int rows>
PF_INLINE void weigh(float (*scores)[kTileKeys], KvTile& tile, Lanes lanes, float* most,
                     float* sums, f32v* corrections) {
    const bool is_part = lanes.high - lanes.low < kTileKeys;
    const uint8_t** lines = tile.lines_to_ask();
    f32v new_max[rows];
    times<rows>([&](auto i) PF_EACH {
        f32v lanes_max;
        times<kTileVectors>([&](auto v) PF_EACH {
            f32v score = load(scores[i] + v * kLanes);
            if (is_scaled) score = score * load(tile.key_scales + v * kLanes);
            if (is_part) score = within(lanes, v * kLanes, score, splat(kMinusInfinity));
            if (is_scaled || is_part) store(scores[i] + v * kLanes, score);
            lanes_max = v == 0 ? score : max(lanes_max, score);
        });
        new_max[i] = max(splat(most[i]), max_everywhere(lanes_max));
        ask<num_lines>(lines);
    });
    // Of all rows at once, a lane each.
    f32v new_most{};
    times<rows>([&](auto i) PF_EACH { new_most[i.value] = new_max[i][0]; });
    const f32v factors = exp_below_one(load_first(most, rows) - new_most);
    times<rows>([&](auto i) PF_EACH {
        most[i] = new_max[i][0];
        corrections[i] = splat_lane<i.value>(factors);
    });
    times<rows>([&](auto i) PF_EACH {
        f32v weights[kTileVectors];
        times<kTileVectors>([&](auto v) PF_EACH {
            weights[v] = load(scores[i] + v * kLanes) - new_max[i];
        });
        exp_below_one(weights);
        f32v sum = load(sums + i * kLanes) * corrections[i];
        times<kTileVectors>([&](auto v) PF_EACH {
            if (is_part) weights[v] = within(lanes, v * kLanes, weights[v], f32v{});
            f32v used = weights[v];
            if (is_scaled) used = used * load(tile.value_scales + v * kLanes);
            const f32v kept = Form::keep(scores[i], v, used);
            sum += is_scaled ? weights[v] : kept;
        });
        store(sums + i * kLanes, sum);
        ask<num_lines>(lines);
    });
    if (num_lines > 0) tile.asking = lines;
}

// mix = mix * correction + weights * values, one chain over the lanes for each channel.
template <class Form, int rows, int vectors>
PF_INLINE void mix_in(float (*weights)[kTileKeys], const KvTile& tile, Lanes lanes, int64_t channel,
                      const f32v* corrections, float* mix, int64_t mix_stride) {
    const auto place = [&](int i, int v) PF_EACH { return mix + i * mix_stride + channel + v * kLanes; };
    f32v sums[rows][vectors];
    times<rows>([&](auto i) PF_EACH {
        times<vectors>([&](auto v) PF_EACH { sums[i][v] = load(place(i, v)) * corrections[i]; });
    });
    for_steps<Form>(lanes.low, lanes.high, [&](int64_t step, auto seen) PF_EACH {
        const float* values = tile.values[step] + channel;
        add_products<Form>([&](int i) PF_EACH { return Form::splat(weights[i] + step); },
                           [&](int v) PF_EACH { return seen(load(values + v * kLanes)); }, sums);
    });
    times<rows>([&](auto i) PF_EACH {
        times<vectors>([&](auto v) PF_EACH { store(place(i, v), sums[i][v]); });
    });
}

// How one kind of tile is used: keys and values of type T, in place or brought along.
template <class T>
struct InPlace {
    using Form = FormOf<T>::Type;
    static constexpr int kMaxRows = kRowsInPlace;
    static constexpr int kMaxHeads = kHeadsInPlace;
    static constexpr int kVectors = std::max(kVectorsInPlace, Form::kValueParts);
    static constexpr int kLastVectors = Form::kValueParts;
    // Scores and mixes ask for as many lines as they use, so hardly any are left. With none in between
    // a core's memory would rest meanwhile: measured.
    static constexpr int kLinesBetween = 1;

    template <int rows>
    static PF_INLINE void score(const float* queries, KvTile& tile, Lanes lanes,
                                int64_t head_dim, float (*scores)[kTileKeys]) {
        const int64_t key_bytes = head_dim * static_cast<int>(sizeof(T));
        score_in_place<Form, rows>(queries, head_dim, tile, lanes.low, lanes.high, key_bytes, scores);
    }
    template <int rows, int vectors>
    static PF_INLINE void mix(float (*weights)[kTileKeys], KvTile& tile, Lanes lanes,
                              int64_t channel, const f32v* corrections, float* mix, int64_t stride) {
        mix_in_place<Form, rows, vectors>(weights, tile, lanes.low, lanes.high, channel,
                                          corrections, mix, stride);
    }
};

template <class T>
struct Brought {
    using Form = FormOf<T>::Type;
    static constexpr int kMaxRows = kRows;
    static constexpr int kMaxHeads = 1;
    static constexpr int kVectors = kMixVectors;
    static constexpr int kLastVectors = 1;
    static constexpr int kLinesBetween = 0;

    template <int rows>
    static PF_INLINE void score(const float* queries, KvTile& tile, Lanes, int64_t head_dim,
                                float (*scores)[kTileKeys]) {
        pf::score<Form, rows>(queries, head_dim, tile, head_dim * Form::kKeyParts / kPerWord<T>, scores);
    }
    template <int rows, int vectors>
    static PF_INLINE void mix(float (*weights)[kTileKeys], KvTile& tile, Lanes lanes,
                              int64_t channel, const f32v* corrections, float* mix, int64_t stride) {
        mix_in<Form, rows, vectors>(weights, tile, lanes, channel, corrections, mix, stride);
    }
};

template <class Use, int rows>
PF_INLINE void mix_all(float (*scores)[kTileKeys], KvTile& tile, Lanes lanes,
                       const f32v* corrections, float* mix, int64_t head_dim) {
    const int64_t mix_stride = padded_dim(head_dim);
    int64_t channel = 0;
    for (; channel + Use::kVectors * kLanes <= mix_stride; channel += Use::kVectors * kLanes)
        Use::template mix<rows, Use::kVectors>(scores, tile, lanes, channel, corrections, mix,
                                               mix_stride);
    for (; channel < mix_stride; channel += Use::kLastVectors * kLanes)
        Use::template mix<rows, Use::kLastVectors>(scores, tile, lanes, channel, corrections, mix,
                                                   mix_stride);
}

// Rows of several heads go through each phase together: in `weigh` one result waits for another, and
// while one head's do, another's are worked on.
//
//     head 0  score          weigh          mix
//     head 1        score          weigh        mix
template <class Use, bool is_scaled, int rows>
void absorb_heads(const RowState& state, const float* queries, int64_t first, int64_t num_heads,
                  int64_t stride, KvTile& tile, Lanes lanes, int64_t head_dim) {
    alignas(64) float memory[Use::kMaxHeads][rows][kTileKeys];
    f32v corrections[Use::kMaxHeads][rows];
    const auto scores_of = [&](int64_t head) PF_EACH {
        float(*scores)[kTileKeys] = memory[head];
        forget(scores);  // or the compiler keeps some in registers that sums need
        if constexpr (Use::kMaxHeads > 1) tile.select(head);
        return scores;
    };
    if constexpr (Use::kMaxHeads == 1) num_heads = 1;
    for (int64_t head = 0; head < num_heads; head++)
        Use::template score<rows>(queries + (first + head * stride) * head_dim, tile, lanes, head_dim,
                                  scores_of(head));
    for (int64_t head = 0; head < num_heads; head++) {
        const int64_t row = first + head * stride;
        weigh<typename Use::Form, is_scaled, Use::kLinesBetween, rows>(
            scores_of(head), tile, lanes, state.max + row, state.sum + row * kLanes, corrections[head]);
    }
    for (int64_t head = 0; head < num_heads; head++)
        mix_all<Use, rows>(scores_of(head), tile, lanes, corrections[head],
                           state.mix + (first + head * stride) * padded_dim(head_dim), head_dim);
}

// Whole register tiles, then the rows that are left; of all heads that are ready.
template <class Use, bool is_scaled, int num_rows>
void absorb_all(const RowState& state, const float* queries, HeadRows rows, KvTile& tile,
                Lanes lanes, int64_t head_dim) {
    if constexpr (num_rows > 0) {
        for (; rows.count >= num_rows; rows.first += num_rows, rows.count -= num_rows)
            absorb_heads<Use, is_scaled, num_rows>(state, queries, rows.first, rows.num_heads,
                                                   rows.stride, tile, lanes, head_dim);
        absorb_all<Use, is_scaled, num_rows - 1>(state, queries, rows, tile, lanes, head_dim);
    }
}

}  // namespace

void RowState::place(float* memory, int64_t num_rows) {
    max = memory;
    sum = max + padded_dim(num_rows);
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
    if (dtype == PF_BF16 && !has_pairs(dtype)) pf::order_by_channels<bf16>(rows, count, rows);
    if (dtype == PF_INT8 && !has_quads(dtype, head_dim)) pf::order_by_channels<int8_t>(rows, count, rows);
}

void RowState::order_by_parts(int64_t first, int64_t num_rows, int64_t head_dim, int32_t dtype) {
    float* rows = mix + first * padded_dim(head_dim);
    const int64_t count = num_rows * padded_dim(head_dim);
    if (dtype == PF_BF16 && !has_pairs(dtype)) pf::order_by_parts<bf16>(rows, count, rows);
    if (dtype == PF_INT8 && !has_quads(dtype, head_dim)) pf::order_by_parts<int8_t>(rows, count, rows);
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

void place_query(const float* query, int64_t head_dim, int32_t dtype, float* to) {
    if constexpr (kHasQuads)
        if (has_quads(dtype, head_dim)) return place_quad_query(query, head_dim, to);
    const auto place = [=](auto* channels) PF_EACH {
        int64_t c = 0;
        for (; c + kLanes <= head_dim; c += kLanes) store(channels + c, load(query + c));
        if (c < head_dim) store_first(channels + c, load_first(query + c, head_dim - c), head_dim - c);
    };
    has_pairs(dtype) ? place(reinterpret_cast<bf16*>(to)) : place(to);
}

int64_t num_asks(const pf_kv_arena& arena, int64_t num_rows) {
    if constexpr (kHasQuads)
        if (has_quads(arena.dtype, arena.head_dim)) return num_quad_asks(num_rows);
    const int64_t head_bytes = arena.head_dim * dtype_bytes(arena.dtype);
    const int64_t num_tiles = (num_rows + kRows - 1) / kRows * (kTileVectors / kVectors);
    return num_tiles * ((head_bytes + 4 * kLanes - 1) / (4 * kLanes));
}

void absorb(const RowState& state, const float* queries, const HeadRows& rows, KvTile& tile,
            Lanes lanes, int64_t head_dim) {
    if constexpr (kHasQuads)
        if (has_quads(tile.dtype, head_dim))
            return absorb_quads(state, queries, rows, tile, lanes, head_dim);
    const auto use = [&]<class T>(T) {
        constexpr bool is_scaled = sizeof(T) == 1;
        const auto absorb_these = tile.is_in_place
                                      ? absorb_all<InPlace<T>, is_scaled, InPlace<T>::kMaxRows>
                                      : absorb_all<Brought<T>, is_scaled, Brought<T>::kMaxRows>;
        absorb_these(state, queries, rows, tile, lanes, head_dim);
    };
    switch (tile.dtype) {
        case PF_F32: return use(float{});
        case PF_BF16: return use(bf16{});
        case PF_INT8: return use(int8_t{});
    }
}

}  // namespace pf
