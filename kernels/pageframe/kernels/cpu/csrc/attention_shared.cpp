#include "attention_shared.h"

#include <algorithm>
#include <iterator>

#include "attention_item.h"

namespace pf {
namespace {

// One shared tile. Rows of a head stand together:
//
//     row     head 0: member 0 [group] | member 1 [group] ..   head 1: ..
class SharedItem {
public:
    SharedItem(const AttentionCall& call, const SharedTile& tile, const SharedTile* next,
               float* memory)
        : call_(call),
          tile_(tile),
          way_{range_of(call, &tile), range_of(call, next), tile_keys(call.layer.arena())},
          shape_(call.shape),
          head_rows_(tile.num_members * shape_.group()),
          is_in_place_(is_used_in_place(call.layer.arena(), head_rows_)) {
        const int64_t dim = shape_.head_dim;
        const int32_t dtype = call.layer.arena().dtype;
        const AttentionScratch scratch(memory, num_rows(), shape_);
        kv_.place(scratch.kv, shape_.num_kv_heads, dim);
        state_.place(scratch.state, num_rows());
        queries_ = scratch.queries;
        for (int64_t row = 0; row < num_rows(); row++) {
            const int64_t head = tile.first_head + row / head_rows_;
            const int64_t query_head = head * shape_.group() + row % shape_.group();
            const float* query =
                call.queries + token_of(row) * call.query_stride + query_head * dim;
            place_query(query, dim, dtype, queries_ + row * dim);
        }
    }

    void run() {
        state_.clear(num_rows(), shape_.head_dim);
        for (int64_t first = tile_.first_key; first < tile_.end_key;) {
            const int64_t end = end_of_tile(first, tile_.end_key, way_.num_keys);
            kv_.find(call_.layer, way_.here.table, first, end);
            kv_.look_ahead(call_.layer, way_, end, num_asks(call_.layer.arena(), head_rows_));
            kv_.use_heads(
                call_.layer, tile_.first_head, tile_.num_heads(), head_rows_,
                [&](int64_t head, int64_t count) {
                    absorb(state_, queries_, {head * head_rows_, head_rows_, count, head_rows_}, kv_,
                           {kv_.low, kv_.high}, shape_.head_dim);
                });
            first = end;
        }
        leave();
    }

private:
    int64_t num_rows() const { return tile_.num_heads() * head_rows_; }
    static const SharedKeys& keys_of(const AttentionCall& call, const SharedTile& tile) {
        return call.plan->sharing.keys[static_cast<size_t>(tile.keys)];
    }
    static KvRange range_of(const AttentionCall& call, const SharedTile* tile) {
        if (tile == nullptr) return {};
        return {call.tables->table(keys_of(call, *tile).sequence, call.group), tile->first_head,
                tile->num_heads(), tile->first_key, tile->end_key};
    }
    int64_t token_of(int64_t row) const {
        const int64_t member = tile_.first_member + row % head_rows_ / shape_.group();
        const int64_t at = keys_of(call_, tile_).first_member + member;
        return call_.plan->sharing.members[static_cast<size_t>(at)];
    }

    void leave() {
        const int64_t group = shape_.group(), split = tile_.first_key / kSplitKeys;
        if (is_in_place_)
            state_.order_by_channels(0, num_rows(), shape_.head_dim, call_.layer.arena().dtype);
        for (int64_t head = 0; head < tile_.num_heads(); head++)
            for (int64_t at = 0; at < tile_.num_members; at++) {
                const Membership member{tile_.keys, tile_.first_member + at};
                const int64_t index =
                    call_.plan->state(member, split, tile_.first_head + head, shape_);
                shared_state(call_, index)
                    .copy(0, state_, head * head_rows_ + at * group, group, shape_.head_dim);
            }
    }

    const AttentionCall& call_;
    const SharedTile& tile_;
    const KvWay way_;
    const HeadShape shape_;
    const int64_t head_rows_;
    const bool is_in_place_;
    KvTile kv_;
    RowState state_;
    float* queries_;
};

}  // namespace

int64_t shared_state_floats(const AttentionPlan& plan, const HeadShape& shape) {
    return plan.num_states * RowState::floats(shape.group(), shape.head_dim);
}

RowState shared_state(const AttentionCall& call, int64_t index) {
    const HeadShape& shape = call.shape;
    RowState state;
    state.place(call.partials + index * RowState::floats(shape.group(), shape.head_dim),
                shape.group());
    return state;
}

void attend_shared(Worker& worker, const AttentionCall& call) {
    const std::vector<SharedTile>& tiles = call.plan->shared_tiles;
    float* scratch = call.scratch + worker.index() * attention_scratch_floats(call.shape);
    worker.parallel_for(std::ssize(tiles), [&](int64_t task) {
        const auto at = static_cast<size_t>(task);
        SharedItem(call, tiles[at], next_tile(tiles, task, worker), scratch).run();
    });
}

}  // namespace pf
