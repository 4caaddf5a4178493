#include "attention_plan.h"

#include <algorithm>
#include <iterator>

namespace pf {
namespace {

// A thread should have several items, so that it matters little who gets the last.
constexpr int64_t kItemsPerThread = 4;

// Loading a key costs about as much as using it for so many query rows.
constexpr int64_t kRowsOfLoading = 4;

// Members that make loading keys for them at once worth while.
constexpr int64_t kMinMembers = 8;

int64_t ceil_divide(int64_t count, int64_t by) { return (count + by - 1) / by; }

int64_t num_splits(const SharedKeys& keys) {
    return ceil_divide(keys.end_key, kSplitKeys) - keys.first_key / kSplitKeys;
}

}  // namespace

int64_t AttentionPlan::cost(const QueryTile& tile, int64_t group) const {
    const int64_t num_keys = tile.first_position + tile.num_tokens - tile.first_key;
    return num_keys * (kRowsOfLoading + tile.num_tokens * group);
}

void AttentionPlan::build(const StepTables& tables, const HeadShape& shape,
                          const std::vector<int64_t>& layer_groups, int64_t new_window,
                          int64_t num_threads) {
    window = new_window;
    num_partials = 0;
    tiles.clear();
    merges.clear();
    sharing.find(tables, layer_groups, window, min_shared_keys);
    add_shared(shape, num_threads);
    std::vector<QueryTile> whole;
    int64_t total = 0;
    for (int64_t sequence = 0; sequence < tables.num_sequences; sequence++) {
        const int64_t end = tables.query_start[sequence + 1];
        const int64_t shift = tables.context_lens[sequence] - end;
        Membership member = sharing.memberships[static_cast<size_t>(sequence)];
        const int64_t end_shared = member.keys < 0 ? 0 : keys_of(member).end_key;
        for (int64_t first = tables.query_start[sequence]; first < end;) {
            const int64_t num_tokens = std::min(shape.tile_tokens(), end - first);
            const int64_t position = first + shift;
            QueryTile tile{};
            tile.sequence = sequence;
            tile.first_token = first;
            tile.num_tokens = num_tokens;
            tile.first_position = position;
            tile.first_key = std::max(first_key(position), end_shared);
            tile.first_split = first_key(position) / kSplitKeys;
            tile.end_split = (position + num_tokens - 1) / kSplitKeys + 1;
            tile.end_head = shape.num_kv_heads;
            tile.partial = -1;
            tile.first_member = member;
            total += cost(tile, shape.group());
            whole.push_back(tile);
            first += num_tokens;
            member.member += num_tokens;
        }
    }
    const int64_t num_items = num_threads * kItemsPerThread;
    // One thread has nobody to share with.
    const int64_t share = total * shape.num_kv_heads / (num_threads == 1 ? 1 : num_items);
    // The longest contexts and prompts come last in a batch; they begin first.
    const bool is_plenty = num_threads == 1 || std::ssize(whole) >= num_items;
    for (auto tile = whole.rbegin(); tile != whole.rend(); ++tile) {
        const bool has_all = is_plenty && tile->num_tokens * shape.num_heads <= shape.all_rows();
        const int64_t num_heads = has_all ? shape.num_kv_heads : 1;
        for (int64_t head = 0; head < shape.num_kv_heads; head += num_heads) {
            tile->first_head = head;
            tile->end_head = head + num_heads;
            add(*tile, cost(*tile, shape.group()) * num_heads > share);
        }
    }
}

// A thread takes what keys of one split do to some members: many enough to make up for loading them,
// few enough for the second-level cache.
void AttentionPlan::add_shared(const HeadShape& shape, int64_t num_threads) {
    shared_tiles.clear();
    first_states.clear();
    num_states = 0;
    for (const SharedKeys& keys : sharing.keys) {
        first_states.push_back(num_states);
        num_states += num_splits(keys) * keys.num_members * shape.num_kv_heads;
    }
    const int64_t num_items = num_threads == 1 ? 1 : num_threads * kItemsPerThread;
    const int64_t most = shape.tile_tokens();
    const int64_t num_members =
        std::clamp(num_states / num_items, std::min(kMinMembers, most), most);
    int64_t num_tiles = 0;
    for (const SharedKeys& keys : sharing.keys)
        num_tiles += num_splits(keys) * ceil_divide(keys.num_members, num_members);
    for (size_t at = 0; at < sharing.keys.size(); at++) {
        const SharedKeys& keys = sharing.keys[at];
        const int64_t num_parts = ceil_divide(keys.num_members, num_members);
        const int64_t num_rows = ceil_divide(keys.num_members, num_parts) * shape.num_heads;
        const bool has_all = num_tiles >= num_items && num_rows <= shape.all_rows();
        SharedTile tile{};
        tile.keys = static_cast<int64_t>(at);
        for (int64_t first = keys.first_key; first < keys.end_key; first = tile.end_key) {
            tile.first_key = first;
            tile.end_key = std::min((first / kSplitKeys + 1) * kSplitKeys, keys.end_key);
            for (int64_t part = 0; part < num_parts; part++) {
                tile.first_member = keys.num_members * part / num_parts;
                tile.num_members = keys.num_members * (part + 1) / num_parts - tile.first_member;
                add_heads(tile, shape.num_kv_heads, has_all);
            }
        }
    }
}

void AttentionPlan::add_heads(SharedTile tile, int64_t num_kv_heads, bool has_all) {
    const int64_t num_heads = has_all ? num_kv_heads : 1;
    for (int64_t head = 0; head < num_kv_heads; head += num_heads) {
        tile.first_head = head;
        tile.end_head = head + num_heads;
        shared_tiles.push_back(tile);
    }
}

void AttentionPlan::add(QueryTile tile, bool is_split) {
    if (!is_split || tile.end_split - tile.first_split == 1) {
        tiles.push_back(tile);
        return;
    }
    const auto first = static_cast<int64_t>(tiles.size());
    const int64_t end_split = tile.end_split;
    while (tile.first_split < end_split) {
        tile.end_split = tile.first_split + 1;
        tile.partial = num_partials;
        num_partials += tile.num_heads();
        tiles.push_back(tile);
        tile.first_split++;
    }
    merges.push_back({first, static_cast<int64_t>(tiles.size())});
}

}  // namespace pf
