#include "attention_sharing.h"

#include <algorithm>
#include <iterator>

#include "kv_tile.h"

namespace pf {
namespace {

// More new tokens than this use a key often enough by themselves.
constexpr int64_t kMaxNewTokens = 8;

// The sequences of one step that may share, in the order of their tables.
class Order {
public:
    Order(const StepTables& tables, const std::vector<int64_t>& layer_groups, int64_t window,
          int64_t min_keys)
        : tables_(tables), layer_groups_(layer_groups), window_(window), min_keys_(min_keys) {
        for (int64_t sequence = 0; sequence < tables.num_sequences; sequence++)
            if (may_share(sequence)) sequences_.push_back(sequence);
        std::sort(sequences_.begin(), sequences_.end(),
                  [this](int64_t a, int64_t b) { return comes_before(a, b); });
        common_.assign(sequences_.size(), 0);
        for (size_t at = 1; at < sequences_.size(); at++)
            common_[at] = num_common_keys(sequences_[at - 1], sequences_[at]);
    }

    // Runs [first, end) of the order that save most, what they save together. Cut first where
    // neighbours have least in common: a run over such a place has no more than that.
    int64_t divide(int64_t first, int64_t end, std::vector<SharedKeys>& runs) const {
        if (end - first < 2) return 0;
        const auto begin = common_.begin();
        const int64_t least = *std::min_element(begin + first + 1, begin + end);
        const size_t num_before = runs.size();
        int64_t saved = 0;
        for (int64_t at = first; at < end;) {
            const int64_t next = std::find(begin + at + 1, begin + end, least) - begin;
            saved += divide(at, next, runs);
            at = next;
        }
        const int64_t saved_by_one = least * (end - first - 1);
        if (saved_by_one == 0 || saved_by_one < saved) return saved;
        runs.resize(num_before);
        const int64_t sequence = sequence_at(first), from = first_key(sequence);
        runs.push_back({sequence, first, end - first, from, from + least});
        return saved_by_one;
    }

    int64_t size() const { return std::ssize(sequences_); }
    int64_t sequence_at(int64_t at) const { return sequences_[static_cast<size_t>(at)]; }

private:
    int64_t first_key(int64_t sequence) const {
        return first_seen(tables_.first_position(sequence), window_);
    }

    // All its tokens see the same keys before their own.
    bool may_share(int64_t sequence) const {
        const int64_t num_tokens = tables_.num_tokens(sequence);
        const int64_t last = tables_.first_position(sequence) + num_tokens - 1;
        return 0 < num_tokens && num_tokens <= kMaxNewTokens &&
               first_seen(last, window_) == first_key(sequence) &&
               last - first_key(sequence) >= min_keys_;
    }

    // Blocks from that of `first` on that are equal in one group of layers, at most to the new tokens.
    int64_t first_difference(int64_t a, int64_t b, int64_t group) const {
        const BlockTable table = tables_.table(a, group), other = tables_.table(b, group);
        const int64_t position = std::min(tables_.first_position(a), tables_.first_position(b));
        const int64_t end = position / tables_.block_size;
        int64_t logical = first_key(a) / tables_.block_size;
        while (logical < end && table[logical] == other[logical]) logical++;
        return logical;
    }

    bool comes_before(int64_t a, int64_t b) const {
        if (first_key(a) != first_key(b)) return first_key(a) < first_key(b);
        const int64_t group = layer_groups_.front();
        const int64_t logical = first_difference(a, b, group);
        const int64_t num_a = tables_.first_position(a) / tables_.block_size;
        const int64_t num_b = tables_.first_position(b) / tables_.block_size;
        if (logical >= std::min(num_a, num_b)) return num_a != num_b ? num_a < num_b : a < b;
        return tables_.table(a, group)[logical] < tables_.table(b, group)[logical];
    }

    // Whole tiles of keys that both see in the same blocks, in the tables of all groups of layers.
    int64_t num_common_keys(int64_t a, int64_t b) const {
        const int64_t first = first_key(a);
        if (first != first_key(b)) return 0;
        int64_t end = std::min(tables_.first_position(a), tables_.first_position(b));
        for (const int64_t group : layer_groups_)
            end = std::min(end, first_difference(a, b, group) * tables_.block_size);
        const int64_t num_keys = end / kMostTileKeys * kMostTileKeys - first;
        return num_keys < min_keys_ ? 0 : num_keys;
    }

    const StepTables& tables_;
    const std::vector<int64_t>& layer_groups_;
    const int64_t window_;
    const int64_t min_keys_;
    std::vector<int64_t> sequences_;
    std::vector<int64_t> common_;  // keys, with the one before
};

}  // namespace

void Sharing::find(const StepTables& tables, const std::vector<int64_t>& layer_groups,
                   int64_t window, int64_t min_keys) {
    keys.clear();
    members.clear();
    memberships.assign(static_cast<size_t>(tables.num_sequences), Membership{-1, 0});
    const Order order(tables, layer_groups, window, min_keys);
    order.divide(0, order.size(), keys);
    // So far members were sequences of the order; now they are tokens.
    for (size_t at = 0; at < keys.size(); at++) {
        SharedKeys& run = keys[at];
        const int64_t first = run.first_member, end = first + run.num_members;
        run.first_member = std::ssize(members);
        for (int64_t place = first; place < end; place++) {
            const int64_t sequence = order.sequence_at(place);
            memberships[static_cast<size_t>(sequence)] = {static_cast<int64_t>(at),
                                                          std::ssize(members) - run.first_member};
            for (int64_t token = 0; token < tables.num_tokens(sequence); token++)
                members.push_back(tables.query_start[sequence] + token);
        }
        run.num_members = std::ssize(members) - run.first_member;
    }
}

}  // namespace pf
