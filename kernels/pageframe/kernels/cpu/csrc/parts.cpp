// Single parts of a step behind the C interface, so that tests can compare each with its reference.
#include <algorithm>

#include "attention.h"
#include "buffer.h"
#include "kv_write.h"
#include "model.h"
#include "pool_handle.h"
#include "softmax.h"

int32_t pf_attention(pf_pool* pool, const pf_attention_call* call) {
    const pf_kv_arena& arena = *call->arena;
    if (arena.head_dim % 8 != 0 || call->num_heads % arena.num_kv_heads != 0)
        return PF_ERROR_ARGUMENT;
    pf::Pool& threads = pool->pool;
    const pf::HeadShape shape{call->num_heads, arena.num_kv_heads, arena.head_dim};
    const pf::StepTables tables{call->num_sequences, call->query_start,   call->context_lens,
                                call->block_tables,  call->table_entries, call->num_groups};
    pf::AttentionPlan plan;
    plan.build(tables, shape, call->window, threads.num_threads());
    pf::Buffer scratch, partials;
    const pf::AttentionCall inner{
        &plan,
        &tables,
        shape,
        pf::KvLayer(arena, call->place),
        call->group,
        call->queries,
        call->num_heads * arena.head_dim,
        call->mixed,
        call->mixed_dtype,
        scratch.take<float>(threads.num_threads() * pf::attention_scratch_floats(shape)),
        partials.take<float>(pf::attention_partial_floats(plan, shape) + 1),
    };
    if (inner.scratch == nullptr || inner.partials == nullptr) return PF_ERROR_MEMORY;
    threads.run([&](pf::Worker& worker) { pf::attend(worker, inner); });
    return PF_OK;
}

int32_t pf_kv_write(const pf_kv_arena* arena, int64_t place, int32_t side, const int64_t* slots,
                    int64_t num_tokens, const float* channels) {
    if (side != 0 && side != 1) return PF_ERROR_ARGUMENT;
    const pf::KvLayer layer(*arena, place);
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t head = 0; head < arena->num_kv_heads; head++)
            pf::kv_write(layer, static_cast<pf::KvSide>(side), slots[token], head,
                         channels + (token * arena->num_kv_heads + head) * arena->head_dim);
    return PF_OK;
}

void pf_exp(const float* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += pf::kLanes) {
        const int64_t num_lanes = std::min<int64_t>(pf::kLanes, count - i);
        pf::store_first(to + i, pf::exp_below_one(pf::load_first(x + i, num_lanes)), num_lanes);
    }
}
