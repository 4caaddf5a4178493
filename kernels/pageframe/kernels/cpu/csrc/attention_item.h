// What the items of the two phases that read keys have in common.
#pragma once

#include "attention_plan.h"
#include "attention_rows.h"

namespace pf {

// A thread's memory for one item of some rows.
struct AttentionScratch {
    const float** queries;  // [rows]
    float* query_copies;    // [rows][head_dim]
    float* kv;              // of a KvTile, pointers first
    float* state;           // of a RowState
    float* rest;

    static int64_t floats(int64_t num_rows, const HeadShape& shape) {
        return num_rows * (kPointerFloats + shape.head_dim) +
               KvTile::scratch_floats(shape.num_kv_heads, shape.head_dim) +
               RowState::floats(num_rows, shape.head_dim);
    }
    AttentionScratch(float* memory, int64_t num_rows, const HeadShape& shape) {
        // Pointers first: only the start is sure to be aligned for them.
        queries = reinterpret_cast<const float**>(memory);
        kv = memory + num_rows * kPointerFloats;
        state = kv + KvTile::scratch_floats(shape.num_kv_heads, shape.head_dim);
        query_copies = state + RowState::floats(num_rows, shape.head_dim);
        rest = query_copies + num_rows * shape.head_dim;
    }
};

}  // namespace pf
