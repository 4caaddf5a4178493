// Which sequences of a step read the same keys, found in their block tables alone.
//
//     tables     a  7 3 9 | 4       b  7 3 9 | 2       c  5 | 1       d  7 3 | 6
//     sorted     c    d    b    a
//     in common     0    2    3             blocks of neighbours
//     groups          [ d  b  a )           2 blocks, by 3; or b and a alone, 3 blocks by 2
//
// Sequences in the order of their tables have those that share most side by side, and what a run of them
// has in common is the least that two neighbours have. Of all ways to cut the order into runs the one
// is taken that saves most reading of keys. Radix trees of requests, as SGLang keeps them, hold the same
// for a whole server; one step needs no more than this.
#pragma once

#include <cstdint>
#include <vector>

#include "kv_layer.h"
#include "simd.h"

namespace pf {

// Lengths and block tables of one step; see executor/batch.py.
struct StepTables {
    int64_t num_sequences;
    const int32_t* query_start;   // [num_sequences + 1]
    const int32_t* context_lens;  // [num_sequences]
    const int32_t* block_tables;  // [num_sequences, table_entries]
    int64_t table_entries;
    int64_t num_groups;  // of layers, which take turns in the tables
    int64_t block_size;  // tokens

    BlockTable table(int64_t sequence, int64_t group) const {
        return {block_tables + sequence * table_entries + group, num_groups};
    }
    int64_t num_tokens(int64_t sequence) const {
        return query_start[sequence + 1] - query_start[sequence];
    }
    // Of the first new token.
    int64_t first_position(int64_t sequence) const {
        return context_lens[sequence] - num_tokens(sequence);
    }
};

// Fewer keys that sequences read one after the other stay in the second-level cache meanwhile, and
// then it takes longer to hand the state of a row on than to read them again: measured with 3 heads
// of 64 channels in bf16. With 8 lanes 256 keys lose up to 15 % and 512 gain 8, 2,000 gain 21; with 16
// lanes and pairs 256 gain 10 to 20 % and 128 gain nothing.
inline constexpr int64_t kMinSharedKeys = kLanes == 16 ? 256 : 512;

// First position that a token at `position` sees.
inline int64_t first_seen(int64_t position, int64_t window) {
    return window == 0 || position < window ? 0 : position - window + 1;
}

// Tokens of several sequences that all see keys [first_key, end_key), in the same blocks. The keys
// before are seen by none of them, and end_key is where a tile of keys ends.
struct SharedKeys {
    int64_t sequence;  // whose block table has them: anyone's
    int64_t first_member;
    int64_t num_members;
    int64_t first_key;
    int64_t end_key;
};

// Where the first token of a sequence stands.
struct Membership {
    int64_t keys;    // which of Sharing::keys; -1 for none
    int64_t member;  // counted from the group's first
};

struct Sharing {
    std::vector<SharedKeys> keys;
    std::vector<int64_t> members;         // tokens of the batch, group by group
    std::vector<Membership> memberships;  // [num_sequences]

    // `layer_groups`: what is shared has to be so in the tables of each. Sequences with fewer than
    // `min_keys` in common share nothing.
    void find(const StepTables& tables, const std::vector<int64_t>& layer_groups, int64_t window,
              int64_t min_keys);
};

}  // namespace pf
