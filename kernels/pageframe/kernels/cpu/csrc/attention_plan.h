// How the attention of one step is cut into tiles: worked out once per step and window, from
// lengths alone, before the threads start.
//
//     position   0       32      64             512                     1024
//     tiles      [ 32 )[ 32 )[ ... )           [ 32 )[ ... )            [ ...      of keys
//     splits     [            split 0          )[          split 1      )[ ...
//
// A query tile is some tokens of one sequence and one KV head, or all of them. All heads of a token
// lie side by side in the pool, so a tile with all reads blocks from end to end: that is for tiles of
// few rows, which use each key little, where there are enough of them for the threads. Usually a tile
// does all splits that its tokens see; one that is far more work than the others (a lone long context)
// gives each split away as a tile of its own, and a second phase merges what they leave.
#pragma once

#include <cstdint>
#include <vector>

#include "kv_tile.h"

namespace pf {

inline constexpr int64_t kSplitKeys = 512;
static_assert(kSplitKeys % kTileKeys == 0);

// Lengths and block tables of one step; see executor/batch.py.
struct StepTables {
    int64_t num_sequences;
    const int32_t* query_start;   // [num_sequences + 1]
    const int32_t* context_lens;  // [num_sequences]
    const int32_t* block_tables;  // [num_sequences, table_entries]
    int64_t table_entries;
    int64_t num_groups;  // of layers, which take turns in the tables

    BlockTable table(int64_t sequence, int64_t group) const {
        return {block_tables + sequence * table_entries + group, num_groups};
    }
};

struct HeadShape {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;

    int64_t group() const { return num_heads / num_kv_heads; }
    // Most tokens of a tile: so many that loading keys is little beside using them, and so few that
    // what the rows keep stays in the second-level cache.
    int64_t tile_tokens() const { return group() < kTileRows ? kTileRows / group() : 1; }
    int64_t tile_rows() const { return tile_tokens() * group(); }
    // Most rows of a tile, over all its KV heads.
    int64_t all_rows() const { return group() < kTileRows ? kTileRows : group(); }

private:
    static constexpr int64_t kTileRows = 96;
};

struct QueryTile {
    int64_t sequence;
    int64_t first_token;     // in the batch
    int64_t num_tokens;
    int64_t first_position;  // of the first token
    int64_t first_split;
    int64_t end_split;
    int64_t first_head;      // of keys and values
    int64_t end_head;
    int64_t partial;  // where a split's first head is left to be merged; -1 for a tile with all

    int64_t num_heads() const { return end_head - first_head; }
};

// Tiles [first, end) are the splits of the same tokens and heads.
struct MergeItem {
    int64_t first;
    int64_t end;
};

struct AttentionPlan {
    int64_t window;  // positions that a token sees, itself included; 0 for all
    int64_t num_partials;
    std::vector<QueryTile> tiles;  // the heads of the same tokens one after another
    std::vector<MergeItem> merges;

    void build(const StepTables& tables, const HeadShape& shape, int64_t new_window,
               int64_t num_threads);

    // First position that a token at `position` sees.
    int64_t first_key(int64_t position) const {
        return window == 0 || position < window ? 0 : position - window + 1;
    }

private:
    int64_t cost(const QueryTile& tile, int64_t group) const;
    void add(QueryTile tile, bool is_split);
};

}  // namespace pf
