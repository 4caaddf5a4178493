#include "attention_quads.h"

#include <cstring>
#include <limits>

#include "kv_quads.h"
#include "row_products.h"
#include "softmax.h"

#ifdef PF_QUADS

namespace pf {
namespace {

// The largest whole number of two signed bytes, the lower from -128 on; and of two unsigned ones.
constexpr float kMostOfQuery = 127.0f * 256.0f + 127.0f;
constexpr float kMostOfWeight = 65535.0f;
// Of a query or a value whose channels are all next to nothing, it is nothing.
constexpr float kSmallest = 1e-30f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// So many sums are under way as registers hold beside a tile's keys, or four of its values.
constexpr int kQuadRows = 3;

// A query as place_quad_query writes it.
struct QuadQuery {
    const uint8_t *high, *low;
    float step;
    int32_t excess;

    QuadQuery(const float* placed, int64_t head_dim)
        : high(reinterpret_cast<const uint8_t*>(placed)), low(high + head_dim) {
        std::memcpy(&step, low + head_dim, sizeof step);
        std::memcpy(&excess, low + head_dim + sizeof step, sizeof excess);
    }
};

// Vectors of scores of a row, and groups of four keys.
constexpr int kHalves = kQuadTileKeys / kLanes;
constexpr int kTileGroups = kQuadTileKeys / 4;

// What one phase leaves for the next, of a head and up to kQuadRows rows. What is of a row is in all four
// lanes of group `row` of a vector.
struct HeadWork {
    f32v scores[kQuadRows][kHalves];  // then exponents
    f32v corrections;  // of all that a row has so far
    f32v parts;        // of what this tile adds to that
    f32v steps;        // of what it adds in whole numbers
    f32v per_value[kHalves];  // whole numbers of a weight of 1, by lane
    uint8_t high[kQuadRows][kQuadTileKeys], low[kQuadRows][kQuadTileKeys];
};

// Groups of four keys and values, from the arena or as `bring_quads` left them.
template <bool is_in_place>
struct Source {
    static constexpr int kMaxHeads = is_in_place ? kHeadsInPlace : 1;

    static PF_INLINE void keys(const KvTile& tile, int64_t channel, int group, u32v (&keys)[4]) {
        if constexpr (is_in_place)
            turn_quad_keys(tile.tokens + 4 * group, tile.key_offset + channel, keys);
        else
            take(tile.keys, channel, group, keys);
    }
    static PF_INLINE void values(const KvTile& tile, int64_t channel, int group, u32v (&values)[4]) {
        if constexpr (is_in_place)
            turn_quad_values(tile.tokens + 4 * group, tile.value_offset + channel, values);
        else
            take(tile.values_copy, channel, group, values);
    }

    // Ask for the lines of one of `num_parts` places that share out `num` evenly.
    template <int num, int part, int num_parts>
    static PF_INLINE void ask_part(const uint8_t**& lines) {
        if constexpr (is_in_place) ask<(part + 1) * num / num_parts - part * num / num_parts>(lines);
    }

private:
    static PF_INLINE void take(const float* brought, int64_t channel, int group, u32v (&words)[4]) {
        const float* from = brought + (channel / kQuadChannels * kTileGroups + group) * 4 * kLanes;
        times<4>([&](auto i) PF_EACH { words[i] = load_as<u32v>(from + i * kLanes); });
    }
};

PF_INLINE u32v splat_word(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word - u32v{};
}

PF_INLINE i32v whole(i32v high, i32v low) { return (high << 8) + low; }

// What `v` has of row `row`, in all lanes; from memory, which is cheaper than from another register.
PF_INLINE f32v splat_row(const f32v& v, int row) {
    float one;
    std::memcpy(&one, reinterpret_cast<const char*>(&v) + 4 * row * static_cast<int>(sizeof one), sizeof one);
    return splat(one);
}

// Scores of one half of the keys, in steps of the query and of each key.
template <class From, int rows>
PF_INLINE void score(const float* queries, int64_t head_dim, KvTile& tile, int half, HeadWork& work) {
    i32v totals[rows];
    times<rows>([&](auto i) PF_EACH {
        totals[i] = i32v{} - QuadQuery(queries + i * head_dim, head_dim).excess;
    });
    const uint8_t** lines = tile.lines_to_ask();
    for (int64_t channel = 0; channel < head_dim; channel += kQuadChannels) {
        u32v keys[kQuadGroups][4];
        times<kQuadGroups>([&](auto group) PF_EACH {
            From::keys(tile, channel, half * kQuadGroups + group, keys[group]);
            From::template ask_part<4, group, kQuadGroups>(lines);
        });
        times<rows>([&](auto i) PF_EACH {
            const QuadQuery query(queries + i * head_dim, head_dim);
            const u32v high = load_as<u32v>(query.high + channel), low = load_as<u32v>(query.low + channel);
            i32v highs[kQuadGroups], lows[kQuadGroups];
            times<kQuadGroups>([&](auto group) PF_EACH { highs[group] = lows[group] = i32v{}; });
            times<4>([&](auto word) PF_EACH {
                From::template ask_part<12, 4 * i + word, 4 * rows>(lines);
                const u32v high_word = splat_within<word>(high), low_word = splat_within<word>(low);
                times<kQuadGroups>([&](auto group) PF_EACH {
                    highs[group] = dot_quads(keys[group][word], high_word, highs[group]);
                    lows[group] = dot_quads(keys[group][word], low_word, lows[group]);
                });
            });
            times<kQuadGroups>([&](auto group) PF_EACH { highs[group] = whole(highs[group], lows[group]); });
            totals[i] += add_groups(highs);
        });
    }
    times<rows>([&](auto i) PF_EACH {
        work.scores[i][half] = __builtin_convertvector(totals[i], f32v);
    });
    tile.asking = lines;
}

// Scores become exponents, of each row below its largest of this tile: what weights are rounded to does not
// depend on what came before, and no tile is too small beside another to count.
template <int rows>
PF_INLINE void compare(const float* queries, int64_t head_dim, const KvTile& tile, Lanes lanes, float* most,
                       HeadWork& work) {
    const bool is_part = lanes.high - lanes.low < kQuadTileKeys;
    f32v largest[kQuadGroups] = {};
    times<kHalves>([&](auto half) PF_EACH {
        f32v value_scales = load(tile.value_scales + half * kLanes);
        if (is_part) value_scales = within(lanes, half * kLanes, value_scales, f32v{});
        // What is no number among values makes none of the weight: bytes have no way to say so.
        const f32v key_scales = fma(value_scales, f32v{}, load(tile.key_scales + half * kLanes));
        work.per_value[half] = value_scales;
        largest[kQuadRows] = half == 0 ? value_scales : max(largest[kQuadRows], value_scales);
        times<rows>([&](auto i) PF_EACH {
            f32v& score = work.scores[i][half];
            score = score * (key_scales * QuadQuery(queries + i * head_dim, head_dim).step);
            if (is_part) score = within(lanes, half * kLanes, score, splat(kMinusInfinity));
            largest[i] = half == 0 ? score : max(largest[i], score);
        });
    });
    const f32v of_tile = max_groups(largest);
    const f32v largest_scale = max(splat(kSmallest), splat_group<kQuadRows>(of_tile));
    const f32v per_scale = kMostOfWeight / largest_scale;
    times<kHalves>([&](auto half) PF_EACH {
        work.per_value[half] = work.per_value[half] * per_scale;
        times<rows>([&](auto i) PF_EACH {
            work.scores[i][half] = work.scores[i][half] - splat_group<i.value>(of_tile);
        });
    });
    // Either what a row had or this tile has its largest: that stays as it is.
    const f32v before = spread_to_groups(load_first(most, rows)), now = max(before, of_tile);
    times<rows>([&](auto i) PF_EACH { most[i] = now[4 * i.value]; });
    const f32v other = exp_below_one(min(before, of_tile) - now);
    work.corrections = select(before == now, splat(1.0f), other);
    work.parts = select(of_tile == now, splat(1.0f), other);
    work.steps = work.parts * (largest_scale * (1.0f / kMostOfWeight));
}

// Exponents become weights.
template <class From, int rows>
PF_INLINE void weigh(KvTile& tile, Lanes lanes, float* sums, HeadWork& work) {
    const bool is_part = lanes.high - lanes.low < kQuadTileKeys;
    times<rows>([&](auto i) PF_EACH {
        f32v weights[kHalves];
        times<kHalves>([&](auto half) PF_EACH { weights[half] = work.scores[i][half]; });
        exp_below_one(weights);
        f32v total{};
        times<kHalves>([&](auto half) PF_EACH {
            if (is_part) weights[half] = within(lanes, half * kLanes, weights[half], f32v{});
            total += weights[half];
            const f32v rounds = fma(weights[half], work.per_value[half], splat(0.5f));
            const i32v numbers = __builtin_convertvector(rounds, i32v);
            store_as(work.high[i] + half * kLanes, __builtin_convertvector(numbers >> 8, i8v));
            store_as(work.low[i] + half * kLanes, __builtin_convertvector(numbers, i8v));
        });
        float* sum = sums + i * kLanes;
        store(sum, fma(total, splat_row(work.parts, i), load(sum) * splat_row(work.corrections, i)));
    });
    // Scores and mixes ask for as many lines as they use; a head's scales are four more.
    const uint8_t** lines = tile.lines_to_ask();
    From::template ask_part<4, 0, 1>(lines);
    tile.asking = lines;
}

// mix = mix * correction + step * weights * values.
template <class From, int rows>
PF_INLINE void mix_in(const HeadWork& work, KvTile& tile, float* mix, int64_t head_dim) {
    const uint8_t** lines = tile.lines_to_ask();
    for (int64_t channel = 0; channel < head_dim; channel += kQuadChannels) {
        i32v highs[rows][4], lows[rows][4];
        times<rows>([&](auto i) PF_EACH {
            times<4>([&](auto v) PF_EACH { highs[i][v] = lows[i][v] = i32v{}; });
        });
        times<kTileGroups>([&](auto group) PF_EACH {
            u32v values[4];
            From::values(tile, channel, group, values);
            times<rows>([&](auto i) PF_EACH {
                From::template ask_part<32, group * rows + i, kTileGroups * rows>(lines);
                const u32v high = splat_word(work.high[i] + 4 * group), low = splat_word(work.low[i] + 4 * group);
                times<4>([&](auto v) PF_EACH {
                    highs[i][v] = dot_quads(high, values[v], highs[i][v]);
                    lows[i][v] = dot_quads(low, values[v], lows[i][v]);
                });
            });
        });
        times<rows>([&](auto i) PF_EACH {
            times<4>([&](auto v) PF_EACH { highs[i][v] = whole(highs[i][v], lows[i][v]); });
            turn_groups(highs[i]);
            const f32v step = splat_row(work.steps, i), correction = splat_row(work.corrections, i);
            times<4>([&](auto v) PF_EACH {
                float* at = mix + i * head_dim + channel + v * kLanes;
                store(at, fma(__builtin_convertvector(highs[i][v], f32v), step, load(at) * correction));
            });
        });
    }
    tile.asking = lines;
}

// Rows of several heads go through each phase together, as in attention_rows.cpp.
template <bool is_in_place, int rows>
void absorb_heads(const RowState& state, const float* queries, int64_t first, int64_t num_heads,
                  int64_t stride, KvTile& tile, Lanes lanes, int64_t head_dim) {
    using From = Source<is_in_place>;
    HeadWork work[From::kMaxHeads];
    if constexpr (!is_in_place) num_heads = 1;
    const auto for_heads = [&](auto&& use) PF_EACH {
        for (int64_t head = 0; head < num_heads; head++) {
            if constexpr (is_in_place) tile.select(head);
            use(work[head], first + head * stride);
        }
    };
    for_heads([&](HeadWork& of_head, int64_t row) PF_EACH {
        for (int half = 0; half < kHalves; half++)
            score<From, rows>(queries + row * head_dim, head_dim, tile, half, of_head);
    });
    if constexpr (!is_in_place) tile.ask_some();
    for_heads([&](HeadWork& of_head, int64_t row) PF_EACH {
        compare<rows>(queries + row * head_dim, head_dim, tile, lanes, state.max + row, of_head);
    });
    for_heads([&](HeadWork& of_head, int64_t row) PF_EACH {
        weigh<From, rows>(tile, lanes, state.sum + row * kLanes, of_head);
    });
    for_heads([&](HeadWork& of_head, int64_t row) PF_EACH {
        mix_in<From, rows>(of_head, tile, state.mix + row * head_dim, head_dim);
    });
    if constexpr (!is_in_place) tile.ask_some();
}

template <bool is_in_place, int num_rows>
void absorb_all(const RowState& state, const float* queries, HeadRows rows, KvTile& tile, Lanes lanes,
                int64_t head_dim) {
    if constexpr (num_rows > 0) {
        for (; rows.count >= num_rows; rows.first += num_rows, rows.count -= num_rows)
            absorb_heads<is_in_place, num_rows>(state, queries, rows.first, rows.num_heads, rows.stride,
                                                tile, lanes, head_dim);
        absorb_all<is_in_place, num_rows - 1>(state, queries, rows, tile, lanes, head_dim);
    }
}

}  // namespace

void place_quad_query(const float* query, int64_t head_dim, float* to) {
    f32v most{}, unlike_numbers{};
    for (int64_t c = 0; c < head_dim; c += kLanes) {
        const f32v channels = load(query + c);
        most = max(most, max(channels, -channels));
        unlike_numbers += channels * 0.0f;  // NaN if there is one, or infinity
    }
    const float largest = max_everywhere(most)[0];
    const float step = largest / kMostOfQuery;
    const f32v per_channel = splat(largest > kSmallest ? kMostOfQuery / largest : 0.0f);
    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    auto* high = reinterpret_cast<int8_t*>(to);
    auto* low = high + head_dim;
    i32v total{};
    for (int64_t c = 0; c < head_dim; c += kLanes) {
        const i32v numbers = (i32v)fma(load(query + c), per_channel, magic) - (i32v)magic;
        const i32v highs = (numbers + 128) >> 8;
        store_as(high + c, __builtin_convertvector(highs, i8v));
        store_as(low + c, __builtin_convertvector(numbers - (highs << 8), i8v));
        total += numbers;
    }
    const int32_t excess = sum_lanes((u32v)total) * 128;
    const float told_step = step + sum_lanes(unlike_numbers);
    std::memcpy(low + head_dim, &told_step, sizeof told_step);
    std::memcpy(low + head_dim + sizeof told_step, &excess, sizeof excess);
}

void absorb_quads(const RowState& state, const float* queries, const HeadRows& rows, KvTile& tile,
                  Lanes lanes, int64_t head_dim) {
    const auto absorb_these = tile.is_in_place ? absorb_all<true, kQuadRows> : absorb_all<false, kQuadRows>;
    absorb_these(state, queries, rows, tile, lanes, head_dim);
}

int64_t num_quad_asks(int64_t num_rows) { return 2 * ((num_rows + kQuadRows - 1) / kQuadRows); }

}  // namespace pf

#endif
