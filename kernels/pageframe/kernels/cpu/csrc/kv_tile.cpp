#include "kv_tile.h"

#include <algorithm>
#include <cstring>

#include "kv_forms.h"
#include "transpose.h"

namespace pf {
namespace {

// Calls use(lane, block, offset, count) for the positions of [first, end) in each block, which are
// slots [offset, offset + count), lanes counted from 0.
template <class Use>
PF_INLINE void for_blocks(int64_t block_size, BlockTable table, int64_t first, int64_t end,
                          Use&& use) {
    int64_t logical = first / block_size, offset = first % block_size;
    for (int64_t at = first; at < end; logical++, offset = 0) {
        const int64_t count = std::min(block_size - offset, end - at);
        use(at - first, table[logical], offset, count);
        at += count;
    }
}

constexpr uintptr_t kPageBytes = 4096;

const uint8_t* next_page(const uint8_t* address) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    return address + (kPageBytes - at % kPageBytes);
}

// So many tiles before its lines are asked for are the pages of a tile looked up.
constexpr int64_t kPagesAhead = 2;

// Ask for a line of each page that a range lies in, long before all of them are: where the machine has to
// look up a page first, in tables that are in no cache either, every line of it would wait for that. Of
// blocks that follow each other in memory as in the sequence it does not.
void find_pages(const KvLayer& layer, const KvRange& range) {
    if (range.first >= range.end) return;
    const pf_kv_arena& arena = layer.arena();
    int64_t before = range.first < arena.block_size ? -1 : range.table[range.first / arena.block_size - 1];
    for_blocks(arena.block_size, range.table, range.first, range.end,
               [&](int64_t, int64_t block, int64_t offset, int64_t count) {
                   const bool follows = block == before + 1;
                   before = block;
                   if (follows) return;
                   const uint8_t* found = nullptr;  // where pages end that were asked for
                   for (const KvSide side : {KvSide::kKeys, KvSide::kValues}) {
                       const uint8_t* const rows = layer.row(side, block, offset, 0);
                       const uint8_t* const end = rows + count * layer.token_bytes();
                       for (const uint8_t* at = std::max(rows, found); at < end; at = found) {
                           prefetch_near(at);
                           found = next_page(at);
                       }
                   }
                   if (arena.dtype == PF_INT8) prefetch_near(layer.scale(KvSide::kKeys, block, offset, 0));
               });
}

// Addresses that are listed at once.
constexpr int kListed = 8;
typedef uint64_t Addresses __attribute__((vector_size(8 * kListed)));
static_assert(sizeof(uintptr_t) == sizeof(uint64_t));

// Appends the lines that hold so many bytes; what it leaves behind them, fewer than kListed, is nobody's.
PF_INLINE const uint8_t** list_run(const uint8_t** to, const void* first, int64_t num_bytes) {
    const int64_t num_lines = (num_bytes + kLineBytes - 1) / kLineBytes;
    Addresses lines = reinterpret_cast<uintptr_t>(first) + kLineBytes * Addresses{0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t n = 0; n < num_lines; n += kListed, lines += kListed * kLineBytes)
        store_as(to + n, lines);
    return to + num_lines;
}

// Of kLanes rows of up to four floats, end to end, the float `column` of each.
PF_INLINE f32v load_column(const float* rows, int64_t num_columns, int64_t column) {
    f32v floats[4];
    times<4>([&](auto i) PF_EACH {
        floats[i] = i < num_columns ? load(rows + i * kLanes) : f32v{};
    });
    i32v which;
    for (int lane = 0; lane < kLanes; lane++) which[lane] = lane;
    which = which * static_cast<int32_t>(num_columns) + static_cast<int32_t>(column);
    const i32v within_two = which & (2 * kLanes - 1);
    return select(which < 2 * kLanes, pick_lanes(floats[0], floats[1], within_two),
                  pick_lanes(floats[2], floats[3], within_two));
}

// kLanes words of a row, or so many as it has; nothing behind the row is touched.
template <bool is_whole>
PF_INLINE f32v load_words(const uint8_t* row, int64_t from, int64_t num_words) {
    const float* words = reinterpret_cast<const float*>(row) + from;
    return is_whole ? load(words) : load_first(words, num_words - from);
}

// A square of words, from word `from` and lane `lane`, into rows of `keys`.
template <class T, bool is_whole>
PF_INLINE void turn_square(const KvTile& tile, int64_t lane, int64_t from, int64_t num_words) {
    f32v square[kLanes];
    for (int i = 0; i < kLanes; i++)
        square[i] = load_words<is_whole>(tile.key_row(lane + i), from, num_words);
    transpose(square);
    for (int i = 0; i < kLanes; i++) {
        if (!is_whole && from + i >= num_words) break;
        for (int part = 0; part < kPerWord<T>; part++)
            store(tile.keys + ((from + i) * kPerWord<T> + part) * kTileKeys + lane,
                  channel_of<T>(square[i], part));
    }
}

template <class T>
void turn_keys(int64_t head_dim, KvTile& tile) {
    const int64_t num_words = head_dim / kPerWord<T>;
    for (int64_t lane = 0; lane < kTileKeys; lane += kLanes) {
        int64_t from = 0;
        for (; from + kLanes <= num_words; from += kLanes)
            turn_square<T, true>(tile, lane, from, num_words);
        if (from < num_words) turn_square<T, false>(tile, lane, from, num_words);
    }
}

template <class T>
void copy_values(int64_t head_dim, KvTile& tile) {
    const int64_t row_floats = padded_dim(head_dim);
    const bool is_float_row = sizeof(T) == sizeof(float) && row_floats == head_dim;
    for (int64_t lane = tile.low; lane < tile.high; lane++) {
        const T* row = reinterpret_cast<const T*>(tile.value_row(lane));
        float* copy = tile.values_copy + lane * row_floats;
        tile.values[lane] = is_float_row ? reinterpret_cast<const float*>(row) : copy;
        if (is_float_row) continue;
        int64_t channel = 0;
        for (; channel + kLanes <= head_dim; channel += kLanes)
            store(copy + channel, load(row + channel));
        if (channel < head_dim) {
            T end[kLanes] = {};
            std::memcpy(end, row + channel, static_cast<size_t>(head_dim - channel) * sizeof(T));
            store(copy + channel, load(end));
        }
    }
}

// Values of two lanes, channel by channel, as Pairs::value has them. Lanes without a position have
// another's.
void pair_values(int64_t head_dim, KvTile& tile) {
    const int64_t row_floats = padded_dim(head_dim);
    const int64_t num_words = head_dim / 2;
    for (int64_t lane = 0; lane < kTileKeys; lane += 2) {
        float* row = tile.values_copy + lane / 2 * row_floats;
        tile.values[lane / 2] = row;
        const auto pair = [&]<bool is_whole>(int64_t from, std::bool_constant<is_whole>) PF_EACH {
            const auto words = [&](int64_t of) PF_EACH {
                return (u32v)load_words<is_whole>(tile.value_row(of), from, num_words);
            };
            const u32v even = words(lane), odd = words(lane + 1);
            store(row + 2 * from, (f32v)pairs_of_low(even, odd));
            if (is_whole || 2 * from + kLanes < head_dim)
                store(row + 2 * from + kLanes, (f32v)pairs_of_high(even, odd));
        };
        int64_t from = 0;
        for (; from + kLanes <= num_words; from += kLanes) pair(from, std::true_type{});
        if (from < num_words) pair(from, std::false_type{});
    }
}

// Vectors in the order of channels, then groups, then as kv_quads.h has them.
void bring_quads([[maybe_unused]] int64_t head_dim, [[maybe_unused]] KvTile& tile) {
#ifdef PF_QUADS
    float *keys = tile.keys, *values = tile.values_copy;
    for (int64_t channel = 0; channel < head_dim; channel += kQuadChannels)
        for (int group = 0; group < kQuadTileKeys / 4; group++) {
            u32v words[4];
            const auto keep = [&](float*& to) PF_EACH {
                times<4>([&](auto i) PF_EACH { store_as(to + i * kLanes, words[i]); });
                to += 4 * kLanes;
            };
            turn_quad_keys(tile.tokens + 4 * group, tile.key_offset + channel, words);
            keep(keys);
            turn_quad_values(tile.tokens + 4 * group, tile.value_offset + channel, words);
            keep(values);
        }
#endif
}

template <class T>
void bring(int64_t head_dim, KvTile& tile) {
    turn_keys<T>(head_dim, tile);
    copy_values<T>(head_dim, tile);
}

template <>
void bring<bf16>(int64_t head_dim, KvTile& tile) {
    if constexpr (kPairRows) {
        turn_keys<float>(head_dim / 2, tile);
        pair_values(head_dim, tile);
    } else {
        turn_keys<bf16>(head_dim, tile);
        copy_values<bf16>(head_dim, tile);
    }
}

}  // namespace

void KvTile::place(float* scratch, int64_t num_heads, int64_t head_dim) {
    ahead = reinterpret_cast<const uint8_t**>(scratch);
    ahead_end = nullptr;
    keys = scratch + ahead_floats(num_heads, head_dim);
    values_copy = keys + kTileKeys * padded_dim(head_dim);
    scales_ = values_copy + kTileKeys * padded_dim(head_dim);
}

void KvTile::find(const KvLayer& layer, BlockTable table, int64_t first, int64_t end) {
    num_keys = tile_keys(layer.arena());
    start = first / num_keys * num_keys;
    low = first - start;
    high = end - start;
    const bool is_scaled = layer.arena().dtype == PF_INT8;
    for_blocks(layer.arena().block_size, table, first, end,
               [&](int64_t lane, int64_t block, int64_t offset, int64_t count) {
                   const uint8_t* row = layer.row(KvSide::kKeys, block, offset, 0);
                   for (int64_t i = low + lane; i < low + lane + count; i++, row += layer.token_bytes())
                       tokens[i] = row;
                   if (!is_scaled) return;
                   const float* scale = layer.scale(KvSide::kKeys, block, offset, 0);
                   for (int64_t i = low + lane; i < low + lane + count; i++)
                       scales[i] = scale, scale += layer.arena().num_kv_heads;
               });
    const auto borrow = [&](int64_t lane) PF_EACH {
        tokens[lane] = tokens[low];
        if (is_scaled) scales[lane] = scales[low];
    };
    for (int64_t lane = 0; lane < low; lane++) borrow(lane);
    for (int64_t lane = high; lane < num_keys; lane++) borrow(lane);
}

void KvTile::list_lines(const KvLayer& layer, const KvRange& next) {
    const pf_kv_arena& arena = layer.arena();
    const uint8_t** to = ahead;
    const int64_t bytes = next.num_heads * layer.head_bytes();
    // All heads of tokens lie end to end, and so do all scales.
    const bool has_all = bytes == layer.token_bytes();
    const int64_t scale_bytes = arena.num_kv_heads * int64_t{sizeof(float)};
    for_blocks(arena.block_size, next.table, next.first, next.end,
               [&](int64_t, int64_t block, int64_t offset, int64_t count) {
                   const int64_t num_runs = has_all ? 1 : count;
                   const int64_t run_bytes = has_all ? count * bytes : bytes;
                   // Scales are wanted first.
                   if (arena.dtype == PF_INT8)
                       for (const KvSide side : {KvSide::kKeys, KvSide::kValues})
                           to = list_run(to, layer.scale(side, block, offset, 0), count * scale_bytes);
                   for (const KvSide side : {KvSide::kKeys, KvSide::kValues}) {
                       const uint8_t* row = layer.row(side, block, offset, next.first_head);
                       for (int64_t i = 0; i < num_runs; i++, row += layer.token_bytes())
                           to = list_run(to, row, run_bytes);
                   }
               });
    asking = ahead;
    const auto nothing_new = reinterpret_cast<uintptr_t>(keys);
    store_as(to, nothing_new - Addresses{});
    // Mostly they are there from the tile before.
    if (ahead_end != to)
        std::fill_n(to, lines_behind(arena.head_dim), reinterpret_cast<uint8_t*>(keys));
    ahead_end = to;
}

void KvTile::look_ahead(const KvLayer& layer, const KvWay& way, int64_t first, int64_t asks_per_head) {
    list_lines(layer, way.tile_at(first));
    const int64_t num_asks = way.here.num_heads * asks_per_head;
    num_at_once = (ahead_end - ahead + num_asks - 1) / num_asks;
    find_pages(layer, way.tile_at(first + kPagesAhead * num_keys));
}

void KvTile::load_scales(const KvLayer& layer, int64_t first, int64_t column, float* of_keys) const {
    float* of_values = of_keys + kMostTileKeys;
    const int64_t num_columns = layer.arena().num_kv_heads, to_values = layer.side_scales();
    // In blocks that hold whole vectors of keys they lie end to end.
    const bool is_run = high - low == num_keys && layer.arena().block_size % kLanes == 0;
    if (kLanes == 16 && is_run && num_columns <= 4) {
        store(of_keys, load_column(scales[first], num_columns, column));
        store(of_values, load_column(scales[first] + to_values, num_columns, column));
        return;
    }
    for (int64_t lane = 0; lane < kLanes; lane++) {
        const float* from = scales[first + lane] + column;
        of_keys[lane] = from[0];
        of_values[lane] = from[to_values];
    }
}

void KvTile::load(const KvLayer& layer, int64_t first_head, int64_t num_heads, int64_t num_rows) {
    const pf_kv_arena& arena = layer.arena();
    dtype = arena.dtype;
    first_ready_ = first_head;
    head_bytes_ = layer.head_bytes();
    side_bytes_ = layer.side_bytes();
    if (arena.dtype == PF_INT8)
        for (int64_t head = 0; head < num_heads; head++)
            for (int64_t lane = 0; lane < num_keys; lane += kLanes)
                load_scales(layer, lane, first_head + head, scales_ + 2 * head * kMostTileKeys + lane);
    select(0);
    is_in_place = is_used_in_place(arena, num_rows);
    if (is_in_place) return;
    if (has_quads(arena.dtype, arena.head_dim)) return bring_quads(arena.head_dim, *this);
    switch (arena.dtype) {
        case PF_F32: return bring<float>(arena.head_dim, *this);
        case PF_BF16: return bring<bf16>(arena.head_dim, *this);
        case PF_INT8: return bring<int8_t>(arena.head_dim, *this);
    }
}

}  // namespace pf
