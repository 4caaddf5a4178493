// One tile of keys and values: up to `tile_keys` positions of one sequence and one KV head, found
// through the block table and, for many query rows, brought into the form that the arithmetic wants.
//
//     few rows    keys and values are used where they lie in the arena (row_products.h)
//     many rows   keys    [head_dim][kTileKeys]   transposed: a lane is a position
//                 values  [kTileKeys][padded_dim] float32; or float32 rows of the arena itself
//                 both as kv_quads.h has them, where they are used in whole numbers
//
// `find` says which positions they are; `load` then goes to one head after the other. Tiles begin at
// multiples of `tile_keys`. A position outside [first, end) is never read: its block may be another
// sequence's, or not exist. Its lane has the keys of another position, and values nobody's.
#pragma once

#include <algorithm>

#include "kv_layer.h"
#include "kv_quads.h"
#include "simd.h"

namespace pf {

// So few that those in use and the next ones, with all heads, stay in the first-level cache.
inline constexpr int64_t kTileKeys = kLanes == 16 ? 16 : 32;
static_assert(kTileKeys % kLanes == 0);
// Of keys in whole numbers, which are half as wide as those that kTileKeys is for.
inline constexpr int64_t kQuadTileKeys = 2 * kLanes;
// A multiple of all.
inline constexpr int64_t kMostTileKeys = std::max(kTileKeys, kQuadTileKeys);

inline int64_t tile_keys(const pf_kv_arena& arena) {
    return has_quads(arena.dtype, arena.head_dim) ? kQuadTileKeys : kTileKeys;
}

// Where the keys from `first` on leave their tile, or end.
inline int64_t end_of_tile(int64_t first, int64_t end, int64_t num_keys) {
    return std::min((first / num_keys + 1) * num_keys, end);
}

// head_dim rounded up to whole vectors: how far apart rows of scratch are.
inline int64_t padded_dim(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// So few query rows use a key or a value one to a few times: to turn or to copy it would cost more. The
// narrower a channel, the more it costs, where channels are widened; measured. In whole numbers it costs
// little; two register tiles of them are a guess.
inline int64_t few_rows(const pf_kv_arena& arena) {
    if (has_quads(arena.dtype, arena.head_dim)) return 6;
    return arena.dtype == PF_F32 ? 6 : arena.dtype == PF_BF16 ? 9 : 18;
}

// Whether so many rows of a head use keys and values where they lie: whole vectors of words only.
inline bool is_used_in_place(const pf_kv_arena& arena, int64_t num_rows) {
    return num_rows <= few_rows(arena) &&
           arena.head_dim * dtype_bytes(arena.dtype) % (4 * kLanes) == 0;
}

// Heads whose rows go through a tile together, where it is used in place.
inline constexpr int kHeadsInPlace = 4;

inline constexpr int64_t kPointerFloats = int64_t{sizeof(void*)} / int64_t{sizeof(float)};

// Ask for some lines, as far as the first-level cache. Few at a time, and as evenly as can be: a core has
// some two dozen lines under way at most, and waits when it asks for more. No branch: with one in the
// loop around it the compiler keeps that loop's sums in memory.
template <int num>
PF_INLINE void ask(const uint8_t**& lines) {
    times<num>([&](auto i) PF_EACH { prefetch_passing(lines[i]); });
    lines += num;
}

// Positions [first, end) of one sequence, and the heads that somebody wants of them; none if `first` is
// not below `end`.
struct KvRange {
    BlockTable table;
    int64_t first_head, num_heads;
    int64_t first, end;

    // Those from `from` on that lie within one tile.
    KvRange tile_from(int64_t from, int64_t num_keys) const {
        return {table, first_head, num_heads, from, end_of_tile(from, end, num_keys)};
    }
};

// What an item reads, and what the one reads that most likely follows on its thread; that may be nothing.
struct KvWay {
    KvRange here, next;
    int64_t num_keys;  // of a tile

    // The tile that begins at `first`: behind the last one of this item comes the first of the next.
    KvRange tile_at(int64_t first) const {
        if (first < here.end) return here.tile_from(first, num_keys);
        return next.tile_from(next.first + (first - here.end) / num_keys * num_keys, num_keys);
    }
};

struct KvTile {
    float* keys;                     // [padded_dim][kTileKeys]
    float* values_copy;              // [kTileKeys][padded_dim]
    const float* values[kTileKeys];  // rows of the arena or of the copy
    int32_t dtype;                   // of what is stored
    int64_t num_keys;                // of a whole tile of this type
    int64_t start;                   // position of lane 0
    int64_t low, high;               // lanes that hold a position: [low, high)

    // Keys of head 0 in the arena, and their scale; lanes without a position have another's.
    const uint8_t* tokens[kMostTileKeys] = {};
    const float* scales[kMostTileKeys];

    // The selected head's rows, in bytes from those of `tokens`.
    bool is_in_place;
    int64_t key_offset, value_offset;

    // What its scores and weights are multiplied by: [num_keys] each, PF_INT8 only.
    const float *key_scales, *value_scales;

    // Lines of the next tile, in the order of their addresses as far as blocks go, then `lines_behind`
    // times one that is there already; and which is the next to ask for.
    const uint8_t** ahead;
    const uint8_t** ahead_end;
    const uint8_t** asking;
    int64_t num_at_once;  // lines to ask for at a time where a tile was brought

    // Floats of scratch that all buffers take together, and that `ahead` takes.
    static int64_t scratch_floats(int64_t num_heads, int64_t head_dim) {
        return ahead_floats(num_heads, head_dim) + 2 * kTileKeys * padded_dim(head_dim) +
               2 * kMostTileKeys * num_heads;
    }
    static int64_t ahead_floats(int64_t num_heads, int64_t head_dim) {
        // Bytes of a row, which may begin and end within a line. Narrow rows have scales, too, and fewer lines
        // with them than rows of floats.
        const int64_t most = num_heads * head_dim * int64_t{sizeof(float)};
        return (2 * kMostTileKeys * (most / kLineBytes + 2) + lines_behind(head_dim)) * kPointerFloats;
    }

    // More lines than a register tile asks for before it looks again whether any are left.
    static int64_t lines_behind(int64_t head_dim) {
        return kMostTileKeys * (padded_dim(head_dim) / 4 + 2);
    }

    // Lay the buffers over `scratch`, which is aligned for pointers.
    void place(float* scratch, int64_t num_heads, int64_t head_dim);

    // Make it the tile of positions [first, end), which lie within one.
    void find(const KvLayer& layer, BlockTable table, int64_t first, int64_t end);

    // Have the machine see what comes from `first` on, behind this tile: blocks lie anywhere. Memory of the
    // next tile is asked for piece by piece while this one is used, of a head `asks_per_head` times if the
    // tile is brought; pages of a later one are looked up.
    void look_ahead(const KvLayer& layer, const KvWay& way, int64_t first, int64_t asks_per_head);

    // Get the keys and values of heads ready, as many at a time as go through a tile together, which so
    // many query rows each will use; each time use(head, count) of those, counted from `first_head`.
    template <class Use>
    void use_heads(const KvLayer& layer, int64_t first_head, int64_t num_heads, int64_t num_rows, Use&& use) {
        const int64_t most = is_used_in_place(layer.arena(), num_rows) ? kHeadsInPlace : 1;
        for (int64_t head = 0; head < num_heads; head += most) {
            const int64_t count = std::min(most, num_heads - head);
            load(layer, first_head + head, count, num_rows);
            use(head, count);
        }
    }

    // Go to one of the heads that are ready, counted from the first.
    void select(int64_t head) {
        key_offset = (first_ready_ + head) * head_bytes_;
        value_offset = key_offset + side_bytes_;
        key_scales = scales_ + 2 * head * kMostTileKeys;
        value_scales = key_scales + kMostTileKeys;
    }

    const uint8_t* key_row(int64_t lane) const { return tokens[lane] + key_offset; }
    const uint8_t* value_row(int64_t lane) const { return tokens[lane] + value_offset; }

    // From where a register tile in place asks: of many, the later ones find nothing left.
    const uint8_t** lines_to_ask() const { return asking < ahead_end ? asking : ahead_end; }

    // Ask for some lines, of a tile that was brought.
    void ask_some() {
        for (int64_t i = 0; i < num_at_once && asking < ahead_end; i++) prefetch_near(*asking++);
    }

private:
    void list_lines(const KvLayer& layer, const KvRange& next);

    // The first of these heads is selected.
    void load(const KvLayer& layer, int64_t first_head, int64_t num_heads, int64_t num_rows);

    // Scales of head `column` for kLanes lanes, from lane `first` on; values' stand behind keys'.
    void load_scales(const KvLayer& layer, int64_t first, int64_t column, float* of_keys) const;

    float* scales_;  // [heads that are ready][2, kMostTileKeys]
    int64_t first_ready_, head_bytes_, side_bytes_;
};

}  // namespace pf
