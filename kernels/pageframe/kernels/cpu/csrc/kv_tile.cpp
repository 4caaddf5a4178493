#include "kv_tile.h"

#include <cstring>

#include "transpose.h"

namespace pf {
namespace {

// The rows of a tile as they lie in the arena; null where a lane holds no position.
struct Rows {
    const uint8_t* at[kTileKeys];
    float scale[kTileKeys];
};

Rows find_rows(const KvLayer& layer, BlockTable table, KvSide side, int64_t head,
               const KvTile& tile) {
    const int64_t block_size = layer.arena().block_size;
    const bool is_scaled = layer.arena().dtype == PF_INT8;
    Rows rows;
    std::memset(&rows, 0, sizeof rows);
    int64_t logical = (tile.start + tile.low) / block_size;
    int64_t offset = (tile.start + tile.low) % block_size;
    for (int64_t lane = tile.low; lane < tile.high; logical++, offset = 0) {
        const int64_t block = table[logical];
        for (; offset < block_size && lane < tile.high; offset++, lane++) {
            rows.at[lane] = layer.row(side, block, offset, head);
            if (is_scaled) rows.scale[lane] = *layer.scale(side, block, offset, head);
        }
    }
    return rows;
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
    const int64_t num_squares = kTileKeys / kLanes * ((num_words + kLanes - 1) / kLanes);
    const int64_t share = (tile.num_ahead + num_squares - 1) / num_squares;
    for (int64_t lane = 0; lane < kTileKeys; lane += kLanes) {
        int64_t from = 0;
        for (; from + kLanes <= num_words; from += kLanes) {
            turn_square<T, is_full, true>(rows, lane, from, num_words, tile.keys);
            tile.ask(share);
        }
        if (from < num_words) {
            turn_square<T, is_full, false>(rows, lane, from, num_words, tile.keys);
            tile.ask(share);
        }
    }
}

template <class T>
void load_values(const Rows& rows, int64_t head_dim, KvTile& tile) {
    const int64_t row_floats = padded_dim(head_dim);
    const bool is_in_place = sizeof(T) == sizeof(float) && row_floats == head_dim;
    for (int64_t lane = tile.low; lane < tile.high; lane++) {
        const T* row = reinterpret_cast<const T*>(rows.at[lane]);
        if (is_in_place) {
            tile.values[lane] = reinterpret_cast<const float*>(row);
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
void load_sides(const KvLayer& layer, BlockTable table, int64_t head, KvTile& tile) {
    const int64_t head_dim = layer.arena().head_dim;
    const Rows keys = find_rows(layer, table, KvSide::kKeys, head, tile);
    const Rows values = find_rows(layer, table, KvSide::kValues, head, tile);
    if (tile.low == 0 && tile.high == kTileKeys)
        load_keys<T, true>(keys, head_dim, tile);
    else
        load_keys<T, false>(keys, head_dim, tile);
    load_values<T>(values, head_dim, tile);
}

// Addresses of the rows of one side, one after the other.
const uint8_t** add_rows(const KvLayer& layer, BlockTable table, KvSide side, int64_t head,
                         int64_t first, int64_t end, const uint8_t** to) {
    const int64_t block_size = layer.arena().block_size;
    int64_t logical = first / block_size, offset = first % block_size;
    for (int64_t at = first; at < end; logical++, offset = 0) {
        const int64_t block = table[logical];
        for (; offset < block_size && at < end; offset++, at++)
            *to++ = layer.row(side, block, offset, head);
    }
    return to;
}

}  // namespace

void KvTile::place(float* scratch, int64_t head_dim) {
    keys = scratch;
    values_copy = scratch + kTileKeys * padded_dim(head_dim);
}

void KvTile::look_ahead(const KvLayer& layer, BlockTable table, int64_t head, int64_t first,
                        int64_t end) {
    const uint8_t** to = add_rows(layer, table, KvSide::kKeys, head, first, end, ahead);
    to = add_rows(layer, table, KvSide::kValues, head, first, end, to);
    num_ahead = to - ahead;
    ahead_bytes = layer.arena().head_dim * dtype_bytes(layer.arena().dtype);
}

void KvTile::ask(int64_t num_rows) {
    constexpr int64_t kLineBytes = 64;
    for (; num_rows > 0 && num_ahead > 0; num_rows--) {
        const uint8_t* row = ahead[--num_ahead];
        for (int64_t byte = 0; byte < ahead_bytes; byte += kLineBytes) prefetch(row + byte);
    }
}

void KvTile::load(const KvLayer& layer, BlockTable table, int64_t head, int64_t first,
                  int64_t end) {
    start = first / kTileKeys * kTileKeys;
    low = first - start;
    high = end - start;
    switch (layer.arena().dtype) {
        case PF_F32: return load_sides<float>(layer, table, head, *this);
        case PF_BF16: return load_sides<bf16>(layer, table, head, *this);
        case PF_INT8: return load_sides<int8_t>(layer, table, head, *this);
    }
}

}  // namespace pf
