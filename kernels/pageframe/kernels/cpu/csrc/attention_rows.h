// The running softmax of some query rows: what one tile of keys and values does to it.
#pragma once

#include <cstdint>

#include "kv_tile.h"
#include "simd.h"

namespace pf {

// State of the rows of one work item over the keys of one split.
//
//     max  [rows]               largest score so far; -infinity before the first
//     sum  [rows][kLanes]       of e^(score - max), by lane
//     mix  [rows][padded_dim]   of e^(score - max) * value
struct RowState {
    float* max;
    float* sum;
    float* mix;

    static int64_t floats(int64_t num_rows, int64_t head_dim) {
        return num_rows * (1 + kLanes + padded_dim(head_dim));
    }
    void place(float* memory, int64_t num_rows);
    void clear(int64_t num_rows, int64_t head_dim);

    // Of mixes from a tile of `dtype` in place, whose channels are by parts until then.
    void order_by_channels(int64_t first, int64_t num_rows, int64_t head_dim, int32_t dtype);
};

// Lanes of a tile that all rows of a call see: [low, high), not empty.
struct Lanes {
    int64_t low, high;
};

// Let rows [first, first + count) take in a tile. `queries[i]` are the channels of row i: by parts, as
// the mix is then, where the tile is used in place.
void absorb(const RowState& state, const float* const* queries, int64_t first, int64_t count,
            KvTile& tile, Lanes lanes, int64_t head_dim);

}  // namespace pf
