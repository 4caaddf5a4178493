// How the attention of one step is cut into tiles: worked out once per step and window, from lengths
// and block tables alone, before the threads start.
//
//     position   0       32      64             512                     1024
//     tiles      [ 32 )[ 32 )[ ... )           [ 32 )[ ... )            [ ...      of keys, or 16
//     splits     [            split 0          )[          split 1      )[ ...
//
// A query tile is some tokens of one sequence and one KV head, or all of them. All heads of a token
// lie side by side in the pool, so a tile with all reads blocks from end to end: that is for tiles of
// few rows, which use each key little, where there are enough of them for the threads. Usually a tile
// does all splits that its tokens see; one that is far more work than the others (a lone long context)
// gives each split away as a tile of its own, and a second phase merges what they leave.
//
// Keys that several sequences have in common are taken in first, by shared tiles: tokens of any
// sequences, the keys of one split.
//
//     a   [        shared          )[ own )
//     b   [        shared          )[    own   )
//     c   [            own             )
//
// What a shared tile leaves is the state of each of its rows, from which the tile of its own sequence
// goes on. Nothing is merged there, so a sequence has the same bits whoever shares with it.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_sharing.h"
#include "kv_tile.h"

namespace pf {

inline constexpr int64_t kSplitKeys = 512;
static_assert(kSplitKeys % kMostTileKeys == 0);

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
    int64_t first_token;  // in the batch
    int64_t num_tokens;
    int64_t first_position;  // of the first token
    int64_t first_key;       // the keys before are not seen, or were taken in by shared tiles
    int64_t first_split;     // that is seen
    int64_t end_split;
    int64_t first_head;  // of keys and values
    int64_t end_head;
    int64_t partial;     // where a split's first head is left to be merged; -1 for a tile with all
    Membership first_member;  // of the first token

    int64_t num_heads() const { return end_head - first_head; }
};

// Tiles [first, end) are the splits of the same tokens and heads.
struct MergeItem {
    int64_t first;
    int64_t end;
};

// Some members of a group take in the keys of one split that they share.
struct SharedTile {
    int64_t keys;  // which of Sharing::keys
    int64_t first_member;
    int64_t num_members;
    int64_t first_key;
    int64_t end_key;
    int64_t first_head;  // of keys and values
    int64_t end_head;

    int64_t num_heads() const { return end_head - first_head; }
};

struct AttentionPlan {
    int64_t window;  // positions that a token sees, itself included; 0 for all
    int64_t min_shared_keys = kMinSharedKeys;
    int64_t num_partials;
    int64_t num_states;            // of a token and KV head, left by shared tiles
    Sharing sharing;
    std::vector<int64_t> first_states;  // of each of sharing.keys
    std::vector<SharedTile> shared_tiles;
    std::vector<QueryTile> tiles;  // the heads of the same tokens one after another
    std::vector<MergeItem> merges;

    // `layer_groups`: of all layers that this plan is for.
    void build(const StepTables& tables, const HeadShape& shape,
               const std::vector<int64_t>& layer_groups, int64_t new_window, int64_t num_threads);

    // First position that a token at `position` sees.
    int64_t first_key(int64_t position) const { return first_seen(position, window); }

    // Whether shared tiles have taken in keys of a split before this member does.
    bool has_state(Membership member, int64_t split) const {
        return member.keys >= 0 && keys_of(member).end_key > split * kSplitKeys;
    }
    // Which state that is.
    int64_t state(Membership member, int64_t split, int64_t head, const HeadShape& shape) const {
        const SharedKeys& keys = keys_of(member);
        const int64_t ordinal = split - keys.first_key / kSplitKeys;
        const int64_t token = ordinal * keys.num_members + member.member;
        return first_states[static_cast<size_t>(member.keys)] + token * shape.num_kv_heads + head;
    }

private:
    int64_t cost(const QueryTile& tile, int64_t group) const;
    void add(QueryTile tile, bool is_split);
    void add_shared(const HeadShape& shape, int64_t num_threads);
    void add_heads(SharedTile tile, int64_t num_kv_heads, bool has_all);
    const SharedKeys& keys_of(Membership member) const {
        return sharing.keys[static_cast<size_t>(member.keys)];
    }
};

}  // namespace pf
