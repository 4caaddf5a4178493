// The C interface of drawing: rows are tasks of the pool.
#include <algorithm>

#include "draw.h"
#include "pageframe_cpu.h"
#include "pool_handle.h"

namespace {

bool is_call(const pf_pool* pool, const pf_draw_call* call, const int64_t* to) {
    return pool && call && to && call->logits && call->best && call->rows && call->temperature &&
           call->scratch && call->num_draws >= 0 && call->num_columns > 0 &&
           call->stride >= call->num_columns;
}

pf::DrawRow row_of(const pf_draw_call& call, int64_t index) {
    const int64_t row = call.rows[index];
    return {call.logits + row * call.stride, call.num_columns, call.best[row],
            call.temperature[index]};
}

// body(index, scratch) for each draw, on the caller's thread alone where there is one draw only:
// waking others takes longer than they would help.
template <class Body>
void for_each_draw(pf::Pool& pool, const pf_draw_call& call, Body&& body) {
    if (call.num_draws == 1) return body(0, call.scratch);
    const int64_t num_bytes = pf::draw_scratch_bytes(call.num_columns);
    pool.run([&](pf::Worker& worker) {
        void* scratch = static_cast<char*>(call.scratch) + worker.index() * num_bytes;
        worker.parallel_for(call.num_draws, [&](int64_t index) { body(index, scratch); });
    });
}

}  // namespace

int64_t pf_draw_scratch_bytes(int64_t num_columns) {
    return num_columns > 0 ? pf::draw_scratch_bytes(num_columns) : int64_t{PF_ERROR_ARGUMENT};
}

int32_t pf_draw(pf_pool* pool, const pf_draw_call* call, int64_t* token_ids) {
    if (!is_call(pool, call, token_ids)) return PF_ERROR_ARGUMENT;
    if (!call->top_k || !call->top_p || !call->min_p || !call->uniforms) return PF_ERROR_ARGUMENT;
    for_each_draw(pool->pool, *call, [=](int64_t index, void* scratch) {
        const pf::DrawFilters filters{call->top_k[index], call->top_p[index], call->min_p[index]};
        token_ids[index] =
            pf::draw_token(row_of(*call, index), filters, call->uniforms[index], scratch);
    });
    const bool has_all = std::all_of(token_ids, token_ids + call->num_draws,
                                     [](int64_t token_id) { return token_id >= 0; });
    return has_all ? PF_OK : PF_ERROR_ARGUMENT;
}

int32_t pf_total_weights(pf_pool* pool, const pf_draw_call* call, int64_t* totals) {
    if (!is_call(pool, call, totals)) return PF_ERROR_ARGUMENT;
    for_each_draw(pool->pool, *call, [=](int64_t index, void* scratch) {
        totals[index] = pf::total_weight(row_of(*call, index), scratch);
    });
    return PF_OK;
}
