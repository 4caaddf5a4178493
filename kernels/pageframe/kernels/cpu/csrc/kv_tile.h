// One tile of keys and values: up to kTileKeys positions of one sequence and one KV head, read
// through the block table and brought into the form that the arithmetic wants.
//
//     keys    [head_dim][kTileKeys]   transposed: a lane is a position
//     values  a pointer per position to its head_dim channels: in the arena itself where they are
//             float32 there, or bf16 and used by few rows; else in a converted copy
//
// `find` says which positions they are; `load` then reads one head after the other. Tiles begin at multiples of kTileKeys. A position outside [first, end) is never read: its block
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
    float* keys;                    // [padded_dim][kTileKeys]
    float* values_copy;             // [kTileKeys][padded_dim]
    const void* values[kTileKeys];  // rows of the arena or of the copy
    bool has_bf16_values;           // else float32
    int64_t start;                  // position of lane 0
    int64_t low, high;              // lanes that hold a position: [low, high)

    // Of each lane that holds a position, the keys of head 0 in the arena, and their scale.
    const uint8_t* tokens[kTileKeys] = {};
    const float* scales[kTileKeys];

    // Rows of the next tile that memory was not yet asked for, and how many to ask for at a time.
    const uint8_t* ahead[2 * kTileKeys];
    int64_t num_ahead, next_ahead, num_ahead_at_once;
    int64_t ahead_bytes;  // of each

    // Floats of scratch that `keys` and `values_copy` take together.
    static int64_t scratch_floats(int64_t head_dim) { return 2 * kTileKeys * padded_dim(head_dim); }

    // Lay the buffers over `scratch`.
    void place(float* scratch, int64_t head_dim);

    // Make it the tile of positions [first, end), which lie within one.
    void find(const KvLayer& layer, BlockTable table, int64_t first, int64_t end);

    // Positions and heads that come next; `load`, called once for each of these heads, asks memory
    // for them meanwhile. The machine does not see them coming: blocks lie anywhere.
    void look_ahead(const KvLayer& layer, BlockTable table, int64_t first_head, int64_t num_heads,
                    int64_t first, int64_t end);

    // Read the keys and values of one head, which so many query rows will use.
    void load(const KvLayer& layer, int64_t head, int64_t num_rows);

    // Ask for some more of what lies ahead.
    void ask();
};

}  // namespace pf
