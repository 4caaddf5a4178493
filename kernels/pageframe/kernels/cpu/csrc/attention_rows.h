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

    // Whole vectors of each, so that none lies in two lines of a cache where the first one does not.
    static int64_t floats(int64_t num_rows, int64_t head_dim) {
        return padded_dim(num_rows) + num_rows * (kLanes + padded_dim(head_dim));
    }
    void place(float* memory, int64_t num_rows);
    void clear(int64_t num_rows, int64_t head_dim);

    // Of mixes from a tile of `dtype` in place, whose channels are by parts until then.
    void order_by_channels(int64_t first, int64_t num_rows, int64_t head_dim, int32_t dtype);
    // The reverse.
    void order_by_parts(int64_t first, int64_t num_rows, int64_t head_dim, int32_t dtype);

    // Rows [first, first + num_rows) become those of `from` that begin at `from_first`.
    void copy(int64_t first, const RowState& from, int64_t from_first, int64_t num_rows,
              int64_t head_dim);
};

// Writes the channels of a query as a tile of `dtype` wants them; `to` has head_dim floats.
void place_query(const float* query, int64_t head_dim, int32_t dtype, float* to);

// Lanes of a tile that all rows of a call see: [low, high), not empty.
struct Lanes {
    int64_t low, high;
};

// `value`, or `other` in those of the kLanes lanes from `first` on that `lanes` leaves out.
PF_INLINE f32v within(Lanes lanes, int first, f32v value, f32v other) {
    i32v lane;
    for (int j = 0; j < kLanes; j++) lane[j] = first + j;
    const auto low = static_cast<int32_t>(lanes.low), high = static_cast<int32_t>(lanes.high);
    return select((lane >= low) & (lane < high), value, other);
}

// Rows [first, first + count), and as many of each other head that is ready, `stride` rows behind.
struct HeadRows {
    int64_t first, count;
    int64_t num_heads, stride;
};

// Let rows take in a tile. `queries` are [rows][head_dim], from row 0 on, each as place_query writes it.
// Where words are widened (kv_words.h) and the tile is used in place, the mix is by parts.
void absorb(const RowState& state, const float* queries, const HeadRows& rows, KvTile& tile,
            Lanes lanes, int64_t head_dim);

// How often `absorb` asks for some of what lies ahead while so many rows take in a tile that was
// brought, for each head.
int64_t num_asks(const pf_kv_arena& arena, int64_t num_rows);

}  // namespace pf
