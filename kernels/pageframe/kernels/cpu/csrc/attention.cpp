#include "attention.h"

#include <algorithm>
#include <cstring>

#include "attention_rows.h"

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

// One query tile and one KV head.
class Item {
public:
    Item(const AttentionCall& call, const QueryTile& tile, int64_t head, float* scratch)
        : call_(call), tile_(tile), shape_(call.shape), head_(head), rows_(num_rows()) {
        // Pointers first: only the start is sure to be aligned for them.
        queries_ = reinterpret_cast<const float**>(scratch);
        scratch += rows_ * kPointerFloats;
        kv_.place(scratch, shape_.head_dim);
        scratch += KvTile::scratch_floats(shape_.head_dim);
        state_.place(scratch, rows_);
        scratch += RowState::floats(rows_, shape_.head_dim);
        merged_.place(scratch, rows_);
        for (int64_t token = 0; token < tile_.num_tokens; token++)
            for (int64_t i = 0; i < shape_.group(); i++)
                queries_[token * shape_.group() + i] =
                    call.queries + (tile_.first_token + token) * call.query_stride +
                    (head_ * shape_.group() + i) * shape_.head_dim;
    }

    static int64_t scratch_floats(int64_t num_rows, int64_t head_dim) {
        return KvTile::scratch_floats(head_dim) + RowState::floats(num_rows, head_dim) +
               SplitState::floats(num_rows, head_dim) + num_rows * kPointerFloats;
    }

    // Attend and write the result, or leave the state of the one split.
    void run() {
        for (int64_t split = tile_.first_split; split < tile_.end_split; split++) {
            run_split(split);
            if (tile_.partial >= 0)
                leave();
            else
                merge(split, state_rows());
        }
        if (tile_.partial < 0) write();
    }

    // Merge what the tiles from `first` left, of the same tokens and consecutive splits.
    void run_merge(const QueryTile* first, const QueryTile* end) {
        for (const QueryTile* tile = first; tile != end; tile++)
            merge(tile->first_split, partial(tile->partial));
        write();
    }

private:
    static constexpr int64_t kPointerFloats = int64_t{sizeof(float*)} / int64_t{sizeof(float)};

    int64_t num_rows() const { return tile_.num_tokens * shape_.group(); }
    int64_t row_floats() const { return padded_dim(shape_.head_dim); }
    int64_t last_position() const { return tile_.first_position + tile_.num_tokens - 1; }

    void run_split(int64_t split) {
        state_.clear(rows_, shape_.head_dim);
        const BlockTable table = call_.tables->table(tile_.sequence, call_.group);
        int64_t first = std::max(split * kSplitKeys, call_.plan->first_key(tile_.first_position));
        const int64_t end = std::min((split + 1) * kSplitKeys, last_position() + 1);
        while (first < end) {
            const int64_t tile_end = std::min((first / kTileKeys + 1) * kTileKeys, end);
            const int64_t next_end = std::min(tile_end + kTileKeys, last_position() + 1);
            kv_.look_ahead(call_.layer, table, head_, tile_end, next_end);
            kv_.load(call_.layer, table, head_, first, tile_end);
            absorb_tile();
            first = tile_end;
        }
    }

    // Tokens [low, high) of the item see all of the tile:
    //
    //     tokens     0 .......... low ............... high .........
    //     tile is    not all past     seen as a whole     not all within the window
    void absorb_tile() {
        const int64_t num_tokens = tile_.num_tokens;
        int64_t low = num_tokens, high = num_tokens;
        if (kv_.low == 0 && kv_.high == kTileKeys) {
            const int64_t to_start = kv_.start - tile_.first_position;
            low = std::clamp<int64_t>(to_start + kTileKeys - 1, 0, num_tokens);
            if (call_.plan->window != 0)
                high = std::clamp(to_start + call_.plan->window, low, num_tokens);
        }
        for (int64_t token = 0; token < low; token++) absorb_token(token);
        const int64_t group = shape_.group();
        absorb(state_, queries_, low * group, (high - low) * group, kv_, {0, kTileKeys},
               shape_.head_dim);
        for (int64_t token = high; token < num_tokens; token++) absorb_token(token);
    }

    void absorb_token(int64_t token) {
        const int64_t position = tile_.first_position + token;
        const int64_t low = std::max(kv_.low, call_.plan->first_key(position) - kv_.start);
        const int64_t high = std::min(kv_.high, position + 1 - kv_.start);
        if (low < high)
            absorb(state_, queries_, token * shape_.group(), shape_.group(), kv_, {low, high},
                   shape_.head_dim);
    }

    // The state with its lanes summed up, in place: the first lane has the sum.
    SplitState state_rows() {
        for (int64_t row = 0; row < rows_; row++)
            state_.sum[row] = sum_lanes(load(state_.sum + row * kLanes));
        return {state_.max, state_.sum, state_.mix};
    }

    void merge(int64_t split, const SplitState& from) {
        for (int64_t row = 0; row < rows_; row++) {
            const int64_t position = tile_.first_position + row / shape_.group();
            const int64_t first_split = call_.plan->first_key(position) / kSplitKeys;
            if (split < first_split || split > position / kSplitKeys) continue;
            merge_row(merged_, split == first_split, from.max[row], from.sum[row],
                      from.mix + row * row_floats(), row, row_floats());
        }
    }

    SplitState partial(int64_t slot) const {
        SplitState left;
        const int64_t floats = SplitState::floats(shape_.tile_rows(), shape_.head_dim);
        left.place(call_.partials + (slot * shape_.num_kv_heads + head_) * floats, rows_);
        return left;
    }

    void leave() {
        const SplitState from = state_rows(), to = partial(tile_.partial);
        const auto bytes = sizeof(float) * static_cast<size_t>(rows_);
        std::memcpy(to.max, from.max, bytes);
        std::memcpy(to.sum, from.sum, bytes);
        std::memcpy(to.mix, from.mix, bytes * static_cast<size_t>(row_floats()));
    }

    void write() const {
        for (int64_t row = 0; row < rows_; row++) {
            const int64_t token = tile_.first_token + row / shape_.group();
            const int64_t head = head_ * shape_.group() + row % shape_.group();
            const int64_t at = (token * shape_.num_heads + head) * shape_.head_dim;
            if (call_.mixed_dtype == PF_BF16)
                write_row(static_cast<bf16*>(call_.mixed) + at, row);
            else
                write_row(static_cast<float*>(call_.mixed) + at, row);
        }
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
    const HeadShape shape_;
    const int64_t head_;
    const int64_t rows_;
    KvTile kv_;
    RowState state_;
    SplitState merged_;
    const float** queries_;
};

}  // namespace

int64_t attention_scratch_floats(const HeadShape& shape) {
    constexpr int64_t kLine = 16;
    const int64_t floats = Item::scratch_floats(shape.tile_rows(), shape.head_dim);
    return (floats + kLine - 1) / kLine * kLine;
}

int64_t attention_partial_floats(const AttentionPlan& plan, const HeadShape& shape) {
    return plan.num_partials * shape.num_kv_heads *
           SplitState::floats(shape.tile_rows(), shape.head_dim);
}

void attend(Worker& worker, const AttentionCall& call) {
    const AttentionPlan& plan = *call.plan;
    const int64_t num_heads = call.shape.num_kv_heads;
    float* scratch = call.scratch + worker.index() * attention_scratch_floats(call.shape);
    const auto num_tiles = static_cast<int64_t>(plan.tiles.size());
    worker.parallel_for(num_tiles * num_heads, [&](int64_t task) {
        const QueryTile& tile = plan.tiles[static_cast<size_t>(task / num_heads)];
        Item(call, tile, task % num_heads, scratch).run();
    });
    const auto num_merges = static_cast<int64_t>(plan.merges.size());
    worker.parallel_for(num_merges * num_heads, [&](int64_t task) {
        const MergeItem& item = plan.merges[static_cast<size_t>(task / num_heads)];
        const QueryTile* tiles = plan.tiles.data();
        Item(call, tiles[item.first], task % num_heads, scratch)
            .run_merge(tiles + item.first, tiles + item.end);
    });
}

}  // namespace pf
