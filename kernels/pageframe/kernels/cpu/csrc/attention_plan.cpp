#include "attention_plan.h"

#include <algorithm>
#include <iterator>

namespace pf {
namespace {

// A thread should have several items, so that it matters little who gets the last.
constexpr int64_t kItemsPerThread = 4;

// Loading a key costs about as much as using it for so many query rows.
constexpr int64_t kRowsOfLoading = 4;

}  // namespace

int64_t AttentionPlan::cost(const QueryTile& tile, int64_t group) const {
    const int64_t num_keys = tile.first_position + tile.num_tokens - first_key(tile.first_position);
    return num_keys * (kRowsOfLoading + tile.num_tokens * group);
}

void AttentionPlan::build(const StepTables& tables, const HeadShape& shape, int64_t new_window,
                          int64_t num_threads) {
    window = new_window;
    num_partials = 0;
    tiles.clear();
    merges.clear();
    std::vector<QueryTile> whole;
    int64_t total = 0;
    for (int64_t sequence = 0; sequence < tables.num_sequences; sequence++) {
        const int64_t end = tables.query_start[sequence + 1];
        const int64_t shift = tables.context_lens[sequence] - end;
        for (int64_t first = tables.query_start[sequence]; first < end;) {
            const int64_t num_tokens = std::min(shape.tile_tokens(), end - first);
            const int64_t position = first + shift;
            QueryTile tile{sequence, first, num_tokens, position, 0, 0, 0, shape.num_kv_heads, -1};
            tile.first_split = first_key(position) / kSplitKeys;
            tile.end_split = (position + num_tokens - 1) / kSplitKeys + 1;
            total += cost(tile, shape.group());
            whole.push_back(tile);
            first += num_tokens;
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
