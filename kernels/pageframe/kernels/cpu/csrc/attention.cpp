#include "attention.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "attention_item.h"
#include "attention_shared.h"

namespace pf {
namespace {

// What is merged: the state of each row after some splits, its lanes summed up.
//
//     max [rows]    sum [rows]    mix [rows][padded_dim]
struct SplitState {
    float* max;
    float* sum;
    float* mix;

    static int64_t floats(int64_t num_rows, int64_t head_dim) {
        return num_rows * (2 + padded_dim(head_dim));
    }
    void place(float* memory, int64_t num_rows) {
        max = memory;
        sum = max + num_rows;
        mix = sum + num_rows;
    }
};

PF_INLINE float exp_one(float x) { return exp(splat(x))[0]; }

// Row `row` of `into` takes in what a later split has; the first one is taken as it is.
void merge_row(const SplitState& into, bool is_first, float split_max, float split_sum,
               const float* split_mix, int64_t row, int64_t row_floats) {
    float* mix = into.mix + row * row_floats;
    if (is_first) {
        into.max[row] = split_max;
        into.sum[row] = split_sum;
        std::memcpy(mix, split_mix, sizeof(float) * static_cast<size_t>(row_floats));
        return;
    }
    const float most = into.max[row] > split_max ? into.max[row] : split_max;
    const float old_part = exp_one(into.max[row] - most), new_part = exp_one(split_max - most);
    into.max[row] = most;
    into.sum[row] = into.sum[row] * old_part + split_sum * new_part;
    for (int64_t c = 0; c < row_floats; c += kLanes)
        store(mix + c, fma(load(split_mix + c), splat(new_part), load(mix + c) * splat(old_part)));
}

// One query tile. Rows of a head stand together:
//
//     row     head 0: token 0 [group] | token 1 [group] ..   head 1: ..
class Item {
public:
    Item(const AttentionCall& call, const QueryTile& tile, const QueryTile* next, float* memory)
        : call_(call),
          tile_(tile),
          way_{keys_of(call, &tile), keys_of(call, next), tile_keys(call.layer.arena())},
          shape_(call.shape),
          first_head_(tile.first_head),
          num_heads_(tile.num_heads()),
          head_rows_(tile.num_tokens * shape_.group()),
          is_in_place_(is_used_in_place(call.layer.arena(), head_rows_)) {
        const int64_t rows = num_heads_ * head_rows_, dim = shape_.head_dim;
        const AttentionScratch scratch(memory, rows, shape_);
        kv_.place(scratch.kv, shape_.num_kv_heads, dim);
        state_.place(scratch.state, rows);
        merged_.place(scratch.rest, rows);
        queries_ = scratch.queries;
        for_rows([&](int64_t row, int64_t token, int64_t query_head) {
            const int64_t at = (tile.first_token + token) * call.query_stride + query_head * dim;
            place_query(call.queries + at, dim, call.layer.arena().dtype, queries_ + row * dim);
        });
    }

    static int64_t scratch_floats(const HeadShape& shape) {
        return AttentionScratch::floats(shape.all_rows(), shape) +
               SplitState::floats(shape.all_rows(), shape.head_dim);
    }

    // Attend and write the result, or leave the state of the one split.
    void run() {
        for (int64_t split = tile_.first_split; split < tile_.end_split; split++) {
            run_split(split);
            if (tile_.partial >= 0)
                leave();
            else
                for (int64_t head = 0; head < num_heads_; head++) merge(split, state_rows(head), head);
        }
        if (tile_.partial < 0) write();
    }

    // Merge what the tiles from `first` left, of the same tokens and consecutive splits.
    void run_merge(const QueryTile* first, const QueryTile* end) {
        for (const QueryTile* tile = first; tile != end; tile++)
            for (int64_t head = 0; head < num_heads_; head++)
                merge(tile->first_split, partial(tile->partial, head), head);
        write();
    }

private:
    int64_t row_floats() const { return padded_dim(shape_.head_dim); }

    static KvRange keys_of(const AttentionCall& call, const QueryTile* tile) {
        if (tile == nullptr) return {};
        return {call.tables->table(tile->sequence, call.group), tile->first_head, tile->num_heads(),
                std::max(tile->first_split * kSplitKeys, tile->first_key),
                tile->first_position + tile->num_tokens};
    }

    // Calls use(row, token, query_head) for each row. For few keys it counts that nothing is divided.
    template <class Use>
    PF_INLINE void for_rows(Use&& use) const {
        const int64_t group = shape_.group();
        int64_t row = 0;
        for (int64_t head = first_head_; head < first_head_ + num_heads_; head++)
            for (int64_t token = 0; token < tile_.num_tokens; token++)
                for (int64_t i = 0; i < group; i++) use(row++, token, head * group + i);
    }

    void run_split(int64_t split) {
        int64_t first = std::max(split * kSplitKeys, tile_.first_key);
        const int64_t end = std::min((split + 1) * kSplitKeys, way_.here.end);
        begin(split, first < end);
        while (first < end) {
            const int64_t tile_end = end_of_tile(first, end, way_.num_keys);
            kv_.find(call_.layer, way_.here.table, first, tile_end);
            kv_.look_ahead(call_.layer, way_, tile_end, num_asks(call_.layer.arena(), head_rows_));
            kv_.use_heads(call_.layer, first_head_, num_heads_, head_rows_, [&](int64_t head, int64_t count) {
                absorb_tile(head * head_rows_, count);
            });
            first = tile_end;
        }
    }

    // A split begins with nothing, or where shared tiles left it, channels in order.
    void begin(int64_t split, bool goes_on) {
        const int64_t rows = num_heads_ * head_rows_, dim = shape_.head_dim;
        is_by_parts_ = is_in_place_ && goes_on;
        if (!call_.plan->has_state(tile_.first_member, split)) return state_.clear(rows, dim);
        const int64_t group = shape_.group();
        for (int64_t row = 0; row < rows; row += group) {
            Membership member = tile_.first_member;
            member.member += row % head_rows_ / group;
            const int64_t head = first_head_ + row / head_rows_;
            const int64_t index = call_.plan->state(member, split, head, shape_);
            state_.copy(row, shared_state(call_, index), 0, group, dim);
        }
        if (is_by_parts_) state_.order_by_parts(0, rows, dim, call_.layer.arena().dtype);
    }

    // Tokens [low, high) of the item see all of the tile; rows of the heads that are ready begin at
    // `first_row`.
    //
    //     tokens     0 .......... low ............... high .........
    //     tile is    not all past     seen as a whole     not all within the window
    void absorb_tile(int64_t first_row, int64_t num_heads) {
        const int64_t num_tokens = tile_.num_tokens;
        int64_t low = num_tokens, high = num_tokens;
        if (kv_.low == 0 && kv_.high == way_.num_keys) {
            const int64_t to_start = kv_.start - tile_.first_position;
            low = std::clamp<int64_t>(to_start + way_.num_keys - 1, 0, num_tokens);
            if (call_.plan->window != 0)
                high = std::clamp(to_start + call_.plan->window, low, num_tokens);
        }
        for (int64_t token = 0; token < low; token++) absorb_token(first_row, num_heads, token);
        absorb_tokens(first_row, num_heads, low, high, {0, way_.num_keys});
        for (int64_t token = high; token < num_tokens; token++)
            absorb_token(first_row, num_heads, token);
    }

    void absorb_token(int64_t first_row, int64_t num_heads, int64_t token) {
        const int64_t position = tile_.first_position + token;
        const int64_t low = std::max(kv_.low, call_.plan->first_key(position) - kv_.start);
        const int64_t high = std::min(kv_.high, position + 1 - kv_.start);
        if (low < high) absorb_tokens(first_row, num_heads, token, token + 1, {low, high});
    }

    void absorb_tokens(int64_t first_row, int64_t num_heads, int64_t first, int64_t end, Lanes lanes) {
        const int64_t group = shape_.group();
        absorb(state_, queries_,
               {first_row + first * group, (end - first) * group, num_heads, head_rows_}, kv_, lanes,
               shape_.head_dim);
    }

    // The state of a head with its lanes summed up and its channels in order.
    SplitState state_rows(int64_t head) {
        const int64_t first = head * head_rows_;
        if (is_by_parts_)
            state_.order_by_channels(first, head_rows_, shape_.head_dim, call_.layer.arena().dtype);
        for (int64_t row = 0; row < head_rows_; row++)
            state_.sum[first + row] = sum_lanes(load(state_.sum + (first + row) * kLanes));
        return {state_.max + first, state_.sum + first, state_.mix + first * row_floats()};
    }

    void merge(int64_t split, const SplitState& from, int64_t head) {
        const int64_t group = shape_.group();
        for (int64_t token = 0; token < tile_.num_tokens; token++) {
            const int64_t position = tile_.first_position + token;
            const int64_t first_split = call_.plan->first_key(position) / kSplitKeys;
            if (split < first_split || split > position / kSplitKeys) continue;
            for (int64_t row = token * group; row < (token + 1) * group; row++)
                merge_row(merged_, split == first_split, from.max[row], from.sum[row],
                          from.mix + row * row_floats(), head * head_rows_ + row, row_floats());
        }
    }

    SplitState partial(int64_t slot, int64_t head) const {
        SplitState left;
        const int64_t floats = SplitState::floats(shape_.tile_rows(), shape_.head_dim);
        float* first = call_.partials + shared_state_floats(*call_.plan, shape_);
        left.place(first + (slot + head) * floats, head_rows_);
        return left;
    }

    void leave() {
        const auto bytes = sizeof(float) * static_cast<size_t>(head_rows_);
        for (int64_t head = 0; head < num_heads_; head++) {
            const SplitState from = state_rows(head), to = partial(tile_.partial, head);
            std::memcpy(to.max, from.max, bytes);
            std::memcpy(to.sum, from.sum, bytes);
            std::memcpy(to.mix, from.mix, bytes * static_cast<size_t>(row_floats()));
        }
    }

    void write() const {
        for_rows([&](int64_t row, int64_t token, int64_t query_head) {
            const int64_t first = (tile_.first_token + token) * shape_.num_heads;
            const int64_t at = (first + query_head) * shape_.head_dim;
            if (call_.mixed_dtype == PF_BF16)
                write_row(static_cast<bf16*>(call_.mixed) + at, row);
            else
                write_row(static_cast<float*>(call_.mixed) + at, row);
        });
    }

    template <class T>
    void write_row(T* to, int64_t row) const {
        const float* mix = merged_.mix + row * row_floats();
        const f32v sum = splat(merged_.sum[row]);
        for (int64_t c = 0; c < shape_.head_dim; c += kLanes)
            store_first(to + c, load(mix + c) / sum,
                        std::min<int64_t>(kLanes, shape_.head_dim - c));
    }

    const AttentionCall& call_;
    const QueryTile& tile_;
    const KvWay way_;
    const HeadShape shape_;
    const int64_t first_head_;
    const int64_t num_heads_;
    const int64_t head_rows_;
    const bool is_in_place_;
    bool is_by_parts_ = false;  // the channels of the state
    KvTile kv_;
    RowState state_;
    SplitState merged_;
    float* queries_;
};

}  // namespace

int64_t attention_scratch_floats(const HeadShape& shape) {
    constexpr int64_t kLine = 16;
    const int64_t floats = Item::scratch_floats(shape);
    return (floats + kLine - 1) / kLine * kLine;
}

int64_t attention_partial_floats(const AttentionPlan& plan, const HeadShape& shape) {
    return shared_state_floats(plan, shape) +
           plan.num_partials * SplitState::floats(shape.tile_rows(), shape.head_dim);
}

void attend(Worker& worker, const AttentionCall& call) {
    const AttentionPlan& plan = *call.plan;
    float* scratch = call.scratch + worker.index() * attention_scratch_floats(call.shape);
    const std::vector<QueryTile>& tiles = plan.tiles;
    attend_shared(worker, call);
    worker.parallel_for(std::ssize(tiles), [&](int64_t task) {
        const auto at = static_cast<size_t>(task);
        Item(call, tiles[at], next_tile(tiles, task, worker), scratch).run();
    });
    worker.parallel_for(std::ssize(plan.merges), [&](int64_t task) {
        const MergeItem& item = plan.merges[static_cast<size_t>(task)];
        const QueryTile* first = tiles.data() + item.first;
        Item(call, *first, nullptr, scratch).run_merge(first, tiles.data() + item.end);
    });
}

}  // namespace pf
