#include "kv_tile.h"

#include <algorithm>
#include <cstring>

#include "transpose.h"

namespace pf {
namespace {

// So few query rows use values once or twice: widening them on the way is cheaper than a copy.
constexpr int64_t kFewRows = 6;

// The rows of a tile as they lie in the arena; null where a lane holds no position.
struct Rows {
    const uint8_t* at[kTileKeys];
    float scale[kTileKeys];
};

// Rows at `offset` bytes and `scale_offset` scales from each lane's keys of head 0.
template <bool is_scaled>
PF_INLINE Rows rows_at(const KvTile& tile, int64_t offset, int64_t scale_offset) {
    Rows rows;
    for (int64_t lane = 0; lane < kTileKeys; lane++) rows.at[lane] = tile.tokens[lane] + offset;
    for (int64_t lane = 0; lane < tile.low; lane++) rows.at[lane] = nullptr;
    for (int64_t lane = tile.high; lane < kTileKeys; lane++) rows.at[lane] = nullptr;
    if constexpr (is_scaled)
        for (int64_t lane = 0; lane < kTileKeys; lane++)
            rows.scale[lane] = rows.at[lane] ? tile.scales[lane][scale_offset] : 0.0f;
    return rows;
}

// Calls use(lane, block, offset) for each position in [first, end), lanes counted from 0.
template <class Use>
PF_INLINE void for_positions(int64_t block_size, BlockTable table, int64_t first, int64_t end,
                             Use&& use) {
    int64_t logical = first / block_size, offset = first % block_size;
    for (int64_t at = first; at < end; logical++, offset = 0) {
        const int64_t block = table[logical];
        for (; offset < block_size && at < end; offset++, at++) use(at - first, block, offset);
    }
}

// Keys are turned as 32-bit words, whatever they hold: kPerWord channels take one turn together.
template <class T>
inline constexpr int kPerWord = 4 / sizeof(T);

// Channel `part` of each lane's word, as a float.
template <class T>
PF_INLINE f32v channel_of(f32v words, int part) {
    if constexpr (sizeof(T) == 4) return words;
    if constexpr (sizeof(T) == 2) return part == 0 ? even_of((u32v)words) : odd_of((u32v)words);
    if constexpr (sizeof(T) == 1)
        return __builtin_convertvector((i32v)((u32v)words << (24 - 8 * part)) >> 24, f32v);
}

// kLanes words of a row, or so many as it has; nothing behind the row is touched.
template <bool is_whole>
PF_INLINE f32v load_words(const uint8_t* row, int64_t from, int64_t num_words) {
    const float* words = reinterpret_cast<const float*>(row) + from;
    return is_whole ? load(words) : load_first(words, num_words - from);
}

// A square of words, from word `from` and lane `lane`, into rows of `keys`.
template <class T, bool is_full, bool is_whole>
PF_INLINE void turn_square(const Rows& rows, int64_t lane, int64_t from, int64_t num_words,
                           float* keys) {
    f32v square[kLanes];
    for (int i = 0; i < kLanes; i++) {
        const uint8_t* row = rows.at[lane + i];
        const bool is_there = is_full || row != nullptr;
        square[i] = is_there ? load_words<is_whole>(row, from, num_words) : f32v{};
    }
    transpose(square);
    const f32v scales = sizeof(T) == 1 ? load(rows.scale + lane) : f32v{};
    for (int i = 0; i < kLanes; i++) {
        if (!is_whole && from + i >= num_words) break;
        for (int part = 0; part < kPerWord<T>; part++) {
            const f32v channel = channel_of<T>(square[i], part);
            store(keys + ((from + i) * kPerWord<T> + part) * kTileKeys + lane,
                  sizeof(T) == 1 ? channel * scales : channel);
        }
    }
}

// Between two squares some rows of the next tile are asked for: all at once would be more than the
// machine can have under way, and it would stand still until they are there.
template <class T, bool is_full>
void load_keys(const Rows& rows, int64_t head_dim, KvTile& tile) {
    const int64_t num_words = head_dim / kPerWord<T>;
    for (int64_t lane = 0; lane < kTileKeys; lane += kLanes) {
        int64_t from = 0;
        for (; from + kLanes <= num_words; from += kLanes) {
            turn_square<T, is_full, true>(rows, lane, from, num_words, tile.keys);
            tile.ask();
        }
        if (from < num_words) {
            turn_square<T, is_full, false>(rows, lane, from, num_words, tile.keys);
            tile.ask();
        }
    }
}

template <class T>
void load_values(const Rows& rows, int64_t head_dim, int64_t num_rows, KvTile& tile) {
    const int64_t row_floats = padded_dim(head_dim);
    const bool is_few = num_rows <= kFewRows;
    tile.has_bf16_values = sizeof(T) == sizeof(bf16) && is_few && row_floats == head_dim;
    const bool is_in_place =
        tile.has_bf16_values || (sizeof(T) == sizeof(float) && row_floats == head_dim);
    for (int64_t lane = tile.low; lane < tile.high; lane++) {
        const T* row = reinterpret_cast<const T*>(rows.at[lane]);
        if (is_in_place) {
            tile.values[lane] = row;
            continue;
        }
        float* copy = tile.values_copy + lane * row_floats;
        const f32v scale = splat(sizeof(T) == 1 ? rows.scale[lane] : 1.0f);
        int64_t channel = 0;
        for (; channel + kLanes <= head_dim; channel += kLanes)
            store(copy + channel, load(row + channel) * scale);
        if (channel < head_dim) {
            T end[kLanes] = {};
            std::memcpy(end, row + channel, static_cast<size_t>(head_dim - channel) * sizeof(T));
            store(copy + channel, load(end) * scale);
        }
        tile.values[lane] = copy;
    }
}

template <class T>
void load_sides(const KvLayer& layer, int64_t head, int64_t num_rows, KvTile& tile) {
    constexpr bool is_scaled = sizeof(T) == 1;
    const int64_t head_dim = layer.arena().head_dim, offset = head * layer.head_bytes();
    const Rows keys = rows_at<is_scaled>(tile, offset, head);
    const Rows values =
        rows_at<is_scaled>(tile, offset + layer.side_bytes(), head + layer.side_scales());
    if (tile.low == 0 && tile.high == kTileKeys)
        load_keys<T, true>(keys, head_dim, tile);
    else
        load_keys<T, false>(keys, head_dim, tile);
    load_values<T>(values, head_dim, num_rows, tile);
}

}  // namespace

void KvTile::place(float* scratch, int64_t head_dim) {
    keys = scratch;
    values_copy = scratch + kTileKeys * padded_dim(head_dim);
}

void KvTile::find(const KvLayer& layer, BlockTable table, int64_t first, int64_t end) {
    start = first / kTileKeys * kTileKeys;
    low = first - start;
    high = end - start;
    const bool is_scaled = layer.arena().dtype == PF_INT8;
    for_positions(layer.arena().block_size, table, first, end,
                  [&](int64_t lane, int64_t block, int64_t offset) {
                      tokens[low + lane] = layer.row(KvSide::kKeys, block, offset, 0);
                      if (is_scaled)
                          scales[low + lane] = layer.scale(KvSide::kKeys, block, offset, 0);
                  });
}

void KvTile::look_ahead(const KvLayer& layer, BlockTable table, int64_t first_head,
                        int64_t num_heads, int64_t first, int64_t end) {
    const int64_t num_keys = std::max<int64_t>(end - first, 0);
    next_ahead = 0;
    num_ahead = 2 * num_keys;
    for_positions(layer.arena().block_size, table, first, end,
                  [&](int64_t lane, int64_t block, int64_t offset) {
                      const uint8_t* row = layer.row(KvSide::kKeys, block, offset, first_head);
                      ahead[lane] = row;
                      ahead[num_keys + lane] = row + layer.side_bytes();
                  });
    ahead_bytes = num_heads * layer.head_bytes();
    const int64_t square_bytes = kLanes * kLanes * 4;
    const int64_t num_asks = num_heads * kTileKeys * layer.head_bytes() / square_bytes;
    num_ahead_at_once = num_ahead / std::max<int64_t>(num_asks, 1) + 1;
}

void KvTile::ask() {
    constexpr int64_t kLineBytes = 64;
    const int64_t end = std::min(next_ahead + num_ahead_at_once, num_ahead);
    for (; next_ahead < end; next_ahead++) {
        const uint8_t* row = ahead[next_ahead];
        for (int64_t byte = 0; byte < ahead_bytes; byte += kLineBytes) prefetch_near(row + byte);
    }
}

void KvTile::load(const KvLayer& layer, int64_t head, int64_t num_rows) {
    switch (layer.arena().dtype) {
        case PF_F32: return load_sides<float>(layer, head, num_rows, *this);
        case PF_BF16: return load_sides<bf16>(layer, head, num_rows, *this);
        case PF_INT8: return load_sides<int8_t>(layer, head, num_rows, *this);
    }
}

}  // namespace pf
