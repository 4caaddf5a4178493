#include "model.h"

#include <algorithm>
#include <cstring>
#include <ctime>

#include "elementwise.h"
#include "kv_write.h"
#include "linear.h"
#include "pool_handle.h"

namespace pf {
namespace {

// Rows of a task where a row is little work.
constexpr int64_t kRowsPerTask = 4;

int64_t num_row_tasks(int64_t num_rows) { return (num_rows + kRowsPerTask - 1) / kRowsPerTask; }

// Calls fn(row) for all rows, a few to a task.
template <class Fn>
void for_rows(Worker& worker, int64_t num_rows, Fn&& fn) {
    worker.parallel_for(num_row_tasks(num_rows), [&](int64_t task) {
        const int64_t end = std::min(num_rows, (task + 1) * kRowsPerTask);
        for (int64_t row = task * kRowsPerTask; row < end; row++) fn(row);
    });
}

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

// Adds the time since the last call to a phase; does nothing on threads without an account.
class Account {
public:
    explicit Account(int64_t* phase_ns) : phase_ns_(phase_ns), last_ns_(phase_ns ? now_ns() : 0) {}

    void charge(pf_phase phase) {
        if (phase_ns_ == nullptr) return;
        const int64_t now = now_ns();
        phase_ns_[phase] += now - last_ns_;
        last_ns_ = now;
    }

private:
    int64_t* phase_ns_;
    int64_t last_ns_;
};

// Memory of one step.
struct Rows {
    float* hidden;    // [T, hidden_size]
    void* normed;     // [T, hidden_size] of rows_dtype
    float* heads;     // [T, heads_stride]: queries, keys, values
    void* mixed;      // [T, num_heads * head_dim] of rows_dtype
    void* activated;  // [T, intermediate] of rows_dtype
    float* cosines;   // [T, head_dim / 2]
    float* sines;     // [T, head_dim / 2]
    float* scratch;
    float* partials;
};

HeadShape head_shape(const pf_model_config& config) {
    return {config.num_heads, config.num_kv_heads, config.head_dim};
}

int64_t heads_stride(const pf_model_config& config) {
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
}

StepTables step_tables(const pf_step& step) {
    return {step.num_sequences, step.query_start, step.context_lens,    step.block_tables,
            step.table_entries, step.num_groups,  step.arena->block_size};
}

// Row `row` of a matrix of `dtype`.
void* row_at(void* rows, int32_t dtype, int64_t row, int64_t stride) {
    return static_cast<uint8_t*>(rows) + row * stride * dtype_bytes(dtype);
}

// One thread's walk through a step. All members are the same on every thread.
class Walk {
public:
    Walk(const pf_model& model, const pf_step& step, const Rows& rows, Worker& worker)
        : model_(model),
          config_(model.config),
          step_(step),
          rows_(rows),
          worker_(worker),
          account_(worker.index() == 0 ? step.phase_ns : nullptr),
          shape_(head_shape(model.config)),
          tables_(step_tables(step)),
          num_rows_(step.num_tokens),
          hidden_(rows.hidden),
          mixed_(rows.mixed) {}

    void run() {
        const int64_t last = config_.num_layers - 1;
        embed();
        for (int64_t layer = 0; layer < last; layer++) {
            mix(layer);
            feed_forward(layer);
        }
        // Behind the last keys and values only wanted rows matter; of a prompt that is one.
        mix(last);
        keep_wanted();
        feed_forward(last);
        norm(config_.final_norm, step_.outputs, PF_F32);
    }

private:
    void embed() {
        const int64_t half = config_.head_dim / 2;
        for_rows(worker_, step_.num_tokens, [&](int64_t token) {
            const int64_t id = step_.token_ids[token];
            float* to = rows_.hidden + token * config_.hidden_size;
            if (config_.embedding == nullptr)
                unpack_row(config_.head, id, to);
            else
                read_row(config_.embedding, config_.embedding_dtype, id, config_.hidden_size, to);
            rotary_angles(step_.positions[token], config_.frequencies, half,
                          rows_.cosines + token * half, rows_.sines + token * half);
        });
        account_.charge(PF_PHASE_EMBEDDING);
    }

    void mix(int64_t index) {
        const pf_layer& layer = model_.layers[static_cast<size_t>(index)];
        norm(layer.attention_norm, rows_.normed, model_.rows_dtype);
        apply(layer.query_key_value, rows_.normed, rows_.heads, PF_F32, PF_STORE);
        account_.charge(PF_PHASE_QUERY_KEY_VALUE);
        place_heads(layer, index);
        attention(index);
    }

    void feed_forward(int64_t index) {
        const pf_layer& layer = model_.layers[static_cast<size_t>(index)];
        apply(layer.attention_output, mixed_, hidden_, PF_F32, PF_ADD);
        account_.charge(PF_PHASE_ATTENTION_OUTPUT);
        norm(layer.feed_forward_norm, rows_.normed, model_.rows_dtype);
        apply(layer.gate_up, rows_.normed, rows_.activated, model_.rows_dtype, PF_STORE);
        account_.charge(PF_PHASE_GATE_UP);
        apply(layer.down, rows_.activated, hidden_, PF_F32, PF_ADD);
        account_.charge(PF_PHASE_DOWN);
    }

    // From here on the walk's rows are the wanted ones: hidden states where the result will be, and
    // what attention mixed where queries were.
    void keep_wanted() {
        const int64_t size = config_.hidden_size;
        const int64_t mixed_size = config_.num_heads * config_.head_dim;
        for_rows(worker_, step_.num_rows, [&](int64_t row) {
            std::memcpy(step_.outputs + row * size, rows_.hidden + step_.rows[row] * size,
                        sizeof(float) * static_cast<size_t>(size));
            std::memcpy(row_at(rows_.heads, model_.rows_dtype, row, mixed_size),
                        row_at(rows_.mixed, model_.rows_dtype, step_.rows[row], mixed_size),
                        static_cast<size_t>(mixed_size * dtype_bytes(model_.rows_dtype)));
        });
        num_rows_ = step_.num_rows;
        hidden_ = step_.outputs;
        mixed_ = rows_.heads;
        account_.charge(PF_PHASE_NORM);
    }

    void norm(const float* weight, void* to, int32_t to_dtype) {
        const int64_t size = config_.hidden_size;
        for_rows(worker_, num_rows_, [&](int64_t row) {
            rms_norm(hidden_ + row * size, weight, config_.norm_epsilon, size,
                     row_at(to, to_dtype, row, size), to_dtype);
        });
        account_.charge(PF_PHASE_NORM);
    }

    void apply(const pf_linear_weights& weights, const void* x, void* y, int32_t y_dtype,
               int32_t epilogue) {
        pf_linear_call call{};
        call.shape = weights.shape;
        call.packed = weights.packed;
        call.x = x;
        call.y = y;
        call.num_rows = num_rows_;
        call.x_stride = weights.shape.num_in;
        call.y_stride = weights.shape.num_out;
        call.x_dtype = model_.rows_dtype;
        call.y_dtype = y_dtype;
        call.epilogue = epilogue;
        linear(worker_, call);
    }

    KvLayer kv_layer(int64_t index) const { return {*step_.arena, step_.layer_places[index]}; }

    // Queries and keys are normalised (Qwen3) and rotated in place; keys and values go to the pool.
    void place_heads(const pf_layer& layer, int64_t index) {
        const KvLayer kv = kv_layer(index);
        const int64_t dim = config_.head_dim, num_queries = config_.num_heads;
        for_rows(worker_, step_.num_tokens, [&](int64_t token) {
            float* heads = rows_.heads + token * heads_stride(config_);
            float* keys = heads + num_queries * dim;
            const int64_t slot = step_.slots[token * step_.num_groups + step_.layer_groups[index]];
            for (int64_t head = 0; head < num_queries; head++)
                turn(heads + head * dim, layer.query_norm, token, config_.score_scale);
            for (int64_t head = 0; head < config_.num_kv_heads; head++) {
                turn(keys + head * dim, layer.key_norm, token, 1.0f);
                kv_write(kv, KvSide::kKeys, slot, head, keys + head * dim);
                kv_write(kv, KvSide::kValues, slot, head,
                         keys + (config_.num_kv_heads + head) * dim);
            }
        });
        account_.charge(PF_PHASE_ROTARY_AND_WRITE);
    }

    void turn(float* head, const float* norm_weight, int64_t token, float scale) const {
        const int64_t dim = config_.head_dim, half = dim / 2;
        if (norm_weight != nullptr)
            rms_norm(head, norm_weight, config_.norm_epsilon, dim, head, PF_F32);
        rotate(head, rows_.cosines + token * half, rows_.sines + token * half, dim, scale);
    }

    void attention(int64_t index) {
        const auto plan = static_cast<size_t>(model_.plan_of_layer[static_cast<size_t>(index)]);
        const AttentionCall call{
            &model_.plans[plan],         &tables_,
            shape_,                      kv_layer(index),
            step_.layer_groups[index],   rows_.heads,
            heads_stride(config_),       rows_.mixed,
            model_.rows_dtype,          rows_.scratch,
            rows_.partials,
        };
        attend(worker_, call);
        account_.charge(PF_PHASE_ATTENTION);
    }

    const pf_model& model_;
    const pf_model_config& config_;
    const pf_step& step_;
    const Rows& rows_;
    Worker& worker_;
    Account account_;
    const HeadShape shape_;
    const StepTables tables_;
    // Rows that go through layers now: how many, their hidden states, what attention mixed.
    int64_t num_rows_;
    float* hidden_;
    const void* mixed_;
};

// Memory for a step of so many rows; hidden is null if there is not enough.
Rows take_rows(pf_model& model, int64_t num_rows, int64_t num_threads) {
    const pf_model_config& config = model.config;
    const HeadShape shape = head_shape(config);
    const int64_t row_bytes = num_rows * dtype_bytes(model.rows_dtype);
    const int64_t half = config.head_dim / 2;
    int64_t num_activated = 0, num_partials = 0;
    for (const pf_layer& layer : model.layers)
        num_activated = std::max(num_activated, layer.gate_up.shape.num_out);
    for (const AttentionPlan& plan : model.plans)
        num_partials = std::max(num_partials, attention_partial_floats(plan, shape));
    Rows rows{};
    rows.hidden = model.hidden.take<float>(num_rows * config.hidden_size);
    rows.normed = model.normed.take<uint8_t>(row_bytes * config.hidden_size);
    rows.heads = model.heads.take<float>(num_rows * heads_stride(config));
    rows.mixed = model.mixed.take<uint8_t>(row_bytes * config.num_heads * config.head_dim);
    rows.activated = model.activated.take<uint8_t>(row_bytes * num_activated);
    rows.cosines = model.angles.take<float>(2 * num_rows * half);
    rows.sines = rows.cosines + num_rows * half;
    rows.scratch = model.scratch.take<float>(num_threads * attention_scratch_floats(shape));
    rows.partials = model.partials.take<float>(num_partials + 1);
    const bool is_there = rows.hidden && rows.normed && rows.heads && rows.mixed &&
                          rows.activated && rows.cosines && rows.scratch && rows.partials;
    if (!is_there) rows.hidden = nullptr;
    return rows;
}

// Groups of the layers that have a plan, each once.
std::vector<int64_t> groups_of(const pf_model& model, const pf_step& step, size_t plan) {
    std::vector<int64_t> groups;
    for (size_t layer = 0; layer < model.layers.size(); layer++)
        if (static_cast<size_t>(model.plan_of_layer[layer]) == plan)
            groups.push_back(step.layer_groups[layer]);
    std::sort(groups.begin(), groups.end());
    groups.erase(std::unique(groups.begin(), groups.end()), groups.end());
    return groups;
}

// One plan for each window that layers have.
void plan_attention(pf_model& model, const pf_step& step, int64_t num_threads) {
    const StepTables tables = step_tables(step);
    for (size_t at = 0; at < model.plans.size(); at++) {
        AttentionPlan& plan = model.plans[at];
        plan.build(tables, head_shape(model.config), groups_of(model, step, at), plan.window,
                   num_threads);
    }
}

bool is_possible(const pf_model_config& config) {
    return config.hidden_size > 0 && config.num_layers > 0 && config.num_kv_heads > 0 &&
           config.num_heads > 0 && config.num_heads % config.num_kv_heads == 0 &&
           config.head_dim > 0 && config.head_dim % 8 == 0;
}

bool fits(const pf_model_config& config, const pf_step& step) {
    const pf_kv_arena& arena = *step.arena;
    if (arena.head_dim != config.head_dim || arena.num_kv_heads != config.num_kv_heads) return false;
    const int64_t vocab_size = config.head.shape.num_out;
    return std::all_of(step.token_ids, step.token_ids + step.num_tokens,
                       [=](int32_t id) { return 0 <= id && id < vocab_size; });
}

// Gives each window that layers have a plan, and each layer its plan.
void name_plans(pf_model& model) {
    for (const pf_layer& layer : model.layers) {
        size_t at = 0;
        while (at < model.plans.size() && model.plans[at].window != layer.window) at++;
        if (at == model.plans.size()) {
            model.plans.emplace_back();
            model.plans.back().window = layer.window;
        }
        model.plan_of_layer.push_back(static_cast<int>(at));
    }
}

}  // namespace
}  // namespace pf

pf_model* pf_model_create(const pf_model_config* config) {
    if (config == nullptr || !pf::is_possible(*config)) return nullptr;
    auto* model = new pf_model(*config);
    pf::name_plans(*model);
    return model;
}

void pf_model_destroy(pf_model* model) { delete model; }

int32_t pf_forward(pf_pool* pool, pf_model* model, const pf_step* step) {
    if (!pf::fits(model->config, *step)) return PF_ERROR_ARGUMENT;
    pf::Pool& threads = pool->pool;
    pf::plan_attention(*model, *step, threads.num_threads());
    const int64_t num_rows = std::max(step->num_tokens, step->num_rows);
    const pf::Rows rows = pf::take_rows(*model, num_rows, threads.num_threads());
    if (rows.hidden == nullptr) return PF_ERROR_MEMORY;
    threads.run([&](pf::Worker& worker) { pf::Walk(*model, *step, rows, worker).run(); });
    return PF_OK;
}

int32_t pf_logits(pf_pool* pool, pf_model* model, const float* outputs, int64_t num_rows,
                  float* logits) {
    const pf_model_config& config = model->config;
    const int64_t size = config.hidden_size;
    const bool is_rounded = model->rows_dtype == PF_BF16;
    auto* rounded = is_rounded ? model->head_rows.take<uint16_t>(num_rows * size) : nullptr;
    if (is_rounded && rounded == nullptr) return PF_ERROR_MEMORY;
    pf_linear_call call{};
    call.shape = config.head.shape;
    call.packed = config.head.packed;
    call.x = is_rounded ? static_cast<const void*>(rounded) : outputs;
    call.y = logits;
    call.num_rows = num_rows;
    call.x_stride = size;
    call.y_stride = config.head.shape.num_out;
    call.x_dtype = model->rows_dtype;
    call.y_dtype = PF_F32;
    call.epilogue = PF_STORE;
    pool->pool.run([&](pf::Worker& worker) {
        if (is_rounded)
            pf::for_rows(worker, num_rows, [&](int64_t row) {
                pf::round_row(outputs + row * size, size, rounded + row * size);
            });
        pf::linear(worker, call);
    });
    return PF_OK;
}
