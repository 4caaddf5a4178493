// The C interface of drawing: rows are tasks of the pool.
#include <algorithm>

#include "draw.h"
#include "pageframe_cpu.h"
#include "philox.h"
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

bool has_columns(const pf_choose_call& call) {
    return call.rows && call.positions && call.seeds && call.sample_indices && call.temperature &&
           call.top_k && call.top_p && call.min_p;
}

bool is_call(const pf_pool* pool, const pf_choose_call* call) {
    return pool && call && call->logits && (!call->is_drawn || has_columns(*call)) &&
           call->scratch && call->maxima && call->token_ids && call->num_rows >= 0 &&
           call->num_columns > 0 && call->stride >= call->num_columns;
}

pf::DrawTerms terms_of(const pf_choose_call& call, int64_t index) {
    const int64_t row = call.rows[index];
    return {call.temperature[row],
            {call.top_k[row], call.top_p[row], call.min_p[row]},
            pf::philox_uniform(call.seeds[row], call.sample_indices[row],
                               static_cast<uint32_t>(call.positions[index]))};
}

// body(index, scratch) for each of `count` rows, on the caller's thread alone where there is only one:
// waking others takes longer than they would help.
template <class Call, class Body>
void for_each_row(pf::Pool& pool, const Call& call, int64_t count, Body&& body) {
    if (count == 1) return body(0, call.scratch);
    const int64_t num_bytes = pf::draw_scratch_bytes(call.num_columns);
    pool.run([&](pf::Worker& worker) {
        void* scratch = static_cast<char*>(call.scratch) + worker.index() * num_bytes;
        worker.parallel_for(count, [&](int64_t index) { body(index, scratch); });
    });
}

bool has_all(const int64_t* token_ids, int64_t count) {
    return std::all_of(token_ids, token_ids + count, [](int64_t token_id) { return token_id >= 0; });
}

}  // namespace

int64_t pf_draw_scratch_bytes(int64_t num_columns) {
    return num_columns > 0 ? pf::draw_scratch_bytes(num_columns) : int64_t{PF_ERROR_ARGUMENT};
}

int32_t pf_draw(pf_pool* pool, const pf_draw_call* call, int64_t* token_ids) {
    if (!is_call(pool, call, token_ids)) return PF_ERROR_ARGUMENT;
    if (!call->top_k || !call->top_p || !call->min_p || !call->uniforms) return PF_ERROR_ARGUMENT;
    for_each_row(pool->pool, *call, call->num_draws, [=](int64_t index, void* scratch) {
        const pf::DrawFilters filters{call->top_k[index], call->top_p[index], call->min_p[index]};
        token_ids[index] =
            pf::draw_token(row_of(*call, index), filters, call->uniforms[index], scratch);
    });
    return has_all(token_ids, call->num_draws) ? PF_OK : PF_ERROR_ARGUMENT;
}

int32_t pf_choose(pf_pool* pool, const pf_choose_call* call) {
    if (!is_call(pool, call)) return PF_ERROR_ARGUMENT;
    for_each_row(pool->pool, *call, call->num_rows, [=](int64_t index, void* scratch) {
        const float* logits = call->logits + index * call->stride;
        const bool is_drawn = call->is_drawn && call->is_drawn[index];
        const pf::BestToken chosen =
            is_drawn ? pf::draw_token(logits, call->num_columns, terms_of(*call, index), scratch)
                     : pf::best_token(logits, call->num_columns, scratch);
        call->maxima[index] = chosen.logit;
        call->token_ids[index] = chosen.token_id;
    });
    return has_all(call->token_ids, call->num_rows) ? PF_OK : PF_ERROR_ARGUMENT;
}

int32_t pf_decode(pf_pool* pool, pf_model* model, const pf_step* step,
                  const pf_choose_call* choice) {
    if (!is_call(pool, choice) || choice->num_rows != step->num_rows) return PF_ERROR_ARGUMENT;
    int32_t error = pf_forward(pool, model, step);
    if (error == PF_OK)
        error = pf_logits(pool, model, step->outputs, step->num_rows, const_cast<float*>(choice->logits));
    return error == PF_OK ? pf_choose(pool, choice) : error;
}

int32_t pf_total_weights(pf_pool* pool, const pf_draw_call* call, int64_t* totals) {
    if (!is_call(pool, call, totals)) return PF_ERROR_ARGUMENT;
    for_each_row(pool->pool, *call, call->num_draws, [=](int64_t index, void* scratch) {
        totals[index] = pf::total_weight(row_of(*call, index), scratch);
    });
    return PF_OK;
}
