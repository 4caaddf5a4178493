// Single parts of a step behind the C interface, so that tests can compare each with its reference.
#include <algorithm>
#include <iterator>
#include <numeric>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "kv_write.h"
#include "model.h"
#include "pool_handle.h"
#include "softmax.h"

namespace {

pf::HeadShape head_shape(const pf_attention_call& call) {
    return {call.num_heads, call.arena->num_kv_heads, call.arena->head_dim};
}

pf::StepTables step_tables(const pf_attention_call& call) {
    return {call.num_sequences, call.query_start, call.context_lens,      call.block_tables,
            call.table_entries, call.num_groups,  call.arena->block_size};
}

pf::AttentionPlan plan_of(const pf_attention_call& call) {
    pf::AttentionPlan plan{};
    if (call.min_shared_keys != 0) plan.min_shared_keys = call.min_shared_keys;
    return plan;
}

}  // namespace

int32_t pf_attention(pf_pool* pool, const pf_attention_call* call) {
    const pf_kv_arena& arena = *call->arena;
    if (arena.head_dim % 8 != 0 || call->num_heads % arena.num_kv_heads != 0)
        return PF_ERROR_ARGUMENT;
    pf::Pool& threads = pool->pool;
    const pf::HeadShape shape = head_shape(*call);
    const pf::StepTables tables = step_tables(*call);
    pf::AttentionPlan plan = plan_of(*call);
    plan.build(tables, shape, {call->group}, call->window, threads.num_threads());
    // Kept between calls, as a model keeps its own.
    static thread_local pf::Buffer scratch, partials;
    const int64_t num_mixed = tables.query_start[tables.num_sequences] * call->num_heads * arena.head_dim;
    auto* const mixed = static_cast<uint8_t*>(call->mixed);
    float* const scratches =
        scratch.take<float>(threads.num_threads() * pf::attention_scratch_floats(shape));
    float* const left = partials.take<float>(pf::attention_partial_floats(plan, shape) + 1);
    if (scratches == nullptr || left == nullptr) return PF_ERROR_MEMORY;
    threads.run([&](pf::Worker& worker) {
        for (int64_t layer = 0; layer < call->num_places; layer++)
            pf::attend(worker, {
                &plan,
                &tables,
                shape,
                pf::KvLayer(arena, call->place + layer),
                call->group,
                call->queries,
                call->num_heads * arena.head_dim,
                mixed + layer * num_mixed * pf::dtype_bytes(call->mixed_dtype),
                call->mixed_dtype,
                scratches,
                left,
            });
    });
    return PF_OK;
}

int64_t pf_attention_shared_tiles(const pf_attention_call* call, int64_t num_threads,
                                  int64_t capacity, int64_t* tiles, int64_t* members) {
    std::vector<int64_t> groups{call->group};
    if (call->group < 0) {
        groups.resize(static_cast<size_t>(call->num_groups));
        std::iota(groups.begin(), groups.end(), int64_t{0});
    }
    pf::AttentionPlan plan = plan_of(*call);
    plan.build(step_tables(*call), head_shape(*call), groups, call->window, num_threads);
    const auto num_tiles = std::ssize(plan.shared_tiles);
    for (int64_t at = 0; at < std::min(num_tiles, capacity); at++) {
        const pf::SharedTile& tile = plan.shared_tiles[static_cast<size_t>(at)];
        const pf::SharedKeys& keys = plan.sharing.keys[static_cast<size_t>(tile.keys)];
        const int64_t first = keys.first_member + tile.first_member;
        const int64_t fields[PF_SHARED_TILE_FIELDS] = {
            tile.first_key,  tile.end_key, tile.first_head,
            tile.end_head, first,        first + tile.num_members};
        std::copy_n(fields, PF_SHARED_TILE_FIELDS, tiles + at * PF_SHARED_TILE_FIELDS);
    }
    std::copy(plan.sharing.members.begin(), plan.sharing.members.end(), members);
    return num_tiles;
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
