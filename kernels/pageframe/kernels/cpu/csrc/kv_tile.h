// One tile of keys and values: up to kTileKeys positions of one sequence and one KV head, read
// through the block table and brought into the form that the arithmetic wants.
//
//     keys    [head_dim][kTileKeys]   transposed: a lane is a position
//     values  a pointer per position to head_dim floats, in the arena itself where they are
//             float32 there, else in a converted copy
//
// Tiles begin at multiples of kTileKeys. A position outside [first, end) is never read: its block
// may be another sequence's, or not exist. Its keys are zeros and its values nobody's.
#pragma once

#include "kv_layer.h"
#include "simd.h"

namespace pf {

inline constexpr int64_t kTileKeys = 32;
static_assert(kTileKeys % kLanes == 0);

// head_dim rounded up to whole vectors: how far apart rows of scratch are.
inline int64_t padded_dim(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

struct KvTile {
    float* keys;                     // [padded_dim][kTileKeys]
    float* values_copy;              // [kTileKeys][padded_dim]
    const float* values[kTileKeys];  // rows of either
    int64_t start;                   // position of lane 0
    int64_t low, high;               // lanes that hold a position: [low, high)
    const uint8_t* ahead[2 * kTileKeys];  // rows of the next tile, not yet asked for
    int64_t num_ahead;
    int64_t ahead_bytes;  // of each

    // Floats of scratch that `keys` and `values_copy` take together.
    static int64_t scratch_floats(int64_t head_dim) { return 2 * kTileKeys * padded_dim(head_dim); }

    // Lay the buffers over `scratch`.
    void place(float* scratch, int64_t head_dim);

    // Read positions [first, end), which lie within one tile.
    void load(const KvLayer& layer, BlockTable table, int64_t head, int64_t first, int64_t end);

    // Positions that will be loaded next; `load` asks memory for them meanwhile. The machine does not
    // see them coming: rows of one head lie apart, and blocks anywhere.
    void look_ahead(const KvLayer& layer, BlockTable table, int64_t head, int64_t first,
                    int64_t end);

    // Ask for so many rows of what lies ahead.
    void ask(int64_t num_rows);

};

}  // namespace pf
