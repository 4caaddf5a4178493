// What the items of the two phases that read keys have in common.
#pragma once

#include <iterator>
#include <vector>

#include "attention_plan.h"
#include "attention_rows.h"
#include "pool.h"

namespace pf {

// A thread's memory for one item of some rows.
struct AttentionScratch {
    float* kv;       // of a KvTile, pointers first
    float* state;    // of a RowState
    float* queries;  // [rows][head_dim], as place_query leaves them
    float* rest;

    static int64_t floats(int64_t num_rows, const HeadShape& shape) {
        return KvTile::scratch_floats(shape.num_kv_heads, shape.head_dim) +
               RowState::floats(num_rows, shape.head_dim) + num_rows * shape.head_dim;
    }
    AttentionScratch(float* memory, int64_t num_rows, const HeadShape& shape) {
        // Pointers first: only the start is sure to be aligned for them.
        kv = memory;
        state = kv + KvTile::scratch_floats(shape.num_kv_heads, shape.head_dim);
        queries = state + RowState::floats(num_rows, shape.head_dim);
        rest = queries + num_rows * shape.head_dim;
    }
};

// The tile that a thread will most likely have after this one: others have those between.
template <class Tile>
const Tile* next_tile(const std::vector<Tile>& tiles, int64_t task, const Worker& worker) {
    const int64_t next = task + worker.num_threads();
    return next < std::ssize(tiles) ? tiles.data() + next : nullptr;
}

}  // namespace pf
