// Causal attention of new tokens over paged keys and values, read in place.
//
// The simple thing is a softmax over all keys of a query. Here keys come in tiles, and each query
// row keeps a running maximum, a running sum and a running mix of values, as in FlashAttention.
//
// Tiles and splits of keys begin at fixed positions (attention_plan.h), a split starts anew, and
// splits are merged in their order, also where one thread does them all. So what is computed for a
// query row depends on nothing but its own position and context: the same bits alone, in a batch, in
// chunks, with any block size and any number of threads. A fixed size of splits for that reason is
// what SGLang's deterministic mode does.
//
// A work item is a query tile: some tokens and KV heads, with all query heads that share them. Tiles of
// few rows use keys and values where they lie (row_products.h), others turn and copy them first
// (kv_tile.h); the order of sums is the same.
#pragma once

#include <cstdint>

#include "attention_plan.h"
#include "kv_layer.h"
#include "pool.h"

namespace pf {

struct AttentionCall {
    const AttentionPlan* plan;
    const StepTables* tables;
    HeadShape shape;
    KvLayer layer;
    int64_t group;         // of layers: which block tables
    const float* queries;  // [T, query_stride], already multiplied by the scale of the softmax
    int64_t query_stride;
    void* mixed;          // [T, num_heads * head_dim] of mixed_dtype
    int32_t mixed_dtype;  // PF_F32 or PF_BF16
    float* scratch;       // attention_scratch_floats for each thread
    float* partials;      // attention_partial_floats: what one phase leaves for the next
};

int64_t attention_scratch_floats(const HeadShape& shape);
int64_t attention_partial_floats(const AttentionPlan& plan, const HeadShape& shape);

// Up to three phases of a run: keys that sequences share, everything else, splits to be merged.
void attend(Worker& worker, const AttentionCall& call);

}  // namespace pf
