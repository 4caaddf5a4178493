#include "draw.h"

#include <algorithm>
#include <cmath>

#include "draw_select.h"
#include "draw_weights.h"

namespace pf {

namespace {

constexpr int64_t kBlock = 256;
// Vectors that go through an operation one behind the other, so that none waits for its own last.
constexpr int kNumChains = 4;
constexpr int kStride = kNumChains * kLanes;
static_assert(kBlock % kStride == 0 && kBlock / kLanes <= WholeSum::kNumVectorsMax);

constexpr float kInfinity = __builtin_inff();
constexpr double kLeastWeight = 1.0 / (double{kHalfOne} * kHalfOne);

PF_INLINE void load_each(const float* from, f32v (&to)[kNumChains]) {
    times<kNumChains>([&](auto i) PF_EACH { to[i] = load(from + i * kLanes); });
}

bool any(i32v mask) {
    int32_t lanes[kLanes];
    store_as(lanes, mask);
    return std::any_of(lanes, lanes + kLanes, [](int32_t lane) { return lane != 0; });
}

int64_t num_blocks_of(int64_t vocab_size) { return (vocab_size + kBlock - 1) / kBlock; }

// Arrays of one thread, one behind the other, each beginning on a cache line.
class Scratch {
public:
    Scratch(void* memory, int64_t vocab_size) : next_(reinterpret_cast<uintptr_t>(memory)) {
        const int64_t num_blocks = num_blocks_of(vocab_size);
        sums = take<int64_t>(num_blocks);
        maxima = take<float>(num_blocks);
        lane_maxima = take<float>(num_blocks * kLanes);
        tail = take<float>(kBlock);
        logits = take<float>(vocab_size + kLanes);
        counts = take<float>(vocab_size + kLanes);
    }

    // Where the last array ends.
    uintptr_t end() const { return next_; }

    int64_t* sums;       // [num_blocks], of kept weights
    float* maxima;       // [num_blocks]
    float* lane_maxima;  // [num_blocks, kLanes]: of every kLanes-th logit of a block
    float* tail;         // [kBlock], the last block, made whole with minus infinity
    float* logits;       // of candidates, as are
    float* counts;

private:
    template <class T>
    T* take(int64_t count) {
        const uintptr_t taken = next_;
        next_ += (static_cast<uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(taken);
    }

    uintptr_t next_;
};

// One row on its way to a token.
class Draw {
public:
    Draw(const float* logits, int64_t vocab_size, void* memory);

    // Comes before all that follows it.
    void weigh_by(const Weighing& weighing) { weighing_ = weighing; }

    BestToken find_best();

    // The token that the filters and a number in [0, 1) come to.
    int64_t draw(const DrawFilters& filters, double uniform);

    // Sum of all weights.
    int64_t total() { return sum({floor_of(0.0), 0.0f}); }

private:
    // A logit below which nothing weighs as much as `weight`, or anything at all.
    float floor_of(double weight) const {
        return weighing_.floor_of(std::max(weight, kLeastWeight));
    }

    // The lowest logit that top-k keeps; minus infinity if none above `floor` is dropped.
    float find_top_k(int64_t top_k, float floor);

    // Likewise top-p. What is to reach `top_p` of its sum is what is at least `from`; an answer
    // below `floor` need not be found.
    float find_top_p(double top_p, float from, float floor);

    // Sum of weights of what is kept; the sums of blocks stay.
    int64_t sum(const Kept& kept);

    // The first token up to which what is kept weighs more than `target`; -1 if there is none.
    // `sum` was of the same.
    int64_t find(const Kept& kept, int64_t target) const;

    // Logits that are probably below the lowest that a filter keeps, but not far: so many are at
    // least as high, or what is lower weighs less than `rest`, and twice that for chance.
    float guess_top_k(double top_k, float floor);
    float guess_top_p(double rest, float lowest);

    // Takes one vector from each block; which part of the row that is.
    double add_sample(float lowest);

    const float* block(int64_t index) const {
        return index == num_whole_ ? scratch_.tail : logits_ + index * kBlock;
    }
    // That of a block with a NaN may be any of its logits.
    template <bool looks_for_nan>
    void find_maximum(int64_t index);
    void find_candidates(float cut);
    int64_t sum_block(int64_t index, const Kept& kept) const;
    template <bool has_min_weight>
    int64_t sum_of(const float* logits, int64_t num_logits, const Kept& kept) const;
    int64_t find_in_block(int64_t index, const Kept& kept, int64_t target) const;

    const float* const logits_;
    const int64_t vocab_size_;
    const int64_t num_blocks_;
    const int64_t num_whole_;  // blocks that are as long as a block
    const Scratch scratch_;
    Weighing weighing_{0.0f, 1.0f};
    Candidates candidates_;
    i32v is_nan_{};  // lanes in which one was seen
    bool has_maxima_ = false;
};

Draw::Draw(const float* logits, int64_t vocab_size, void* memory)
    : logits_(logits),
      vocab_size_(vocab_size),
      num_blocks_(num_blocks_of(vocab_size)),
      num_whole_(vocab_size / kBlock),
      scratch_(memory, vocab_size),
      candidates_(scratch_.logits, scratch_.counts) {
    float* end = std::copy(logits + num_whole_ * kBlock, logits + vocab_size, scratch_.tail);
    std::fill(end, scratch_.tail + kBlock, -kInfinity);
}

template <bool looks_for_nan>
void Draw::find_maximum(int64_t index) {
    const float* logits = block(index);
    f32v chains[kNumChains], next[kNumChains];
    i32v is_nan{};
    times<kNumChains>([&](auto j) PF_EACH { chains[j] = splat(-kInfinity); });
    for (int64_t i = 0; i < kBlock; i += kStride) {
        load_each(logits + i, next);
        times<kNumChains>([&](auto j) PF_EACH { chains[j] = max(chains[j], next[j]); });
        if constexpr (looks_for_nan)
            times<kNumChains>([&](auto j) PF_EACH { is_nan |= next[j] != next[j]; });
    }
    const f32v highest = max(max(chains[0], chains[1]), max(chains[2], chains[3]));
    store(scratch_.lane_maxima + index * kLanes, highest);
    scratch_.maxima[index] = max_everywhere(highest)[0];
    if constexpr (looks_for_nan) is_nan_ |= is_nan;
}

BestToken Draw::find_best() {
    for (int64_t index = 0; index < num_blocks_; index++) find_maximum<true>(index);
    has_maxima_ = true;
    if (any(is_nan_)) return {__builtin_nanf(""), 0};
    const float* highest = std::max_element(scratch_.maxima, scratch_.maxima + num_blocks_);
    const float* first = logits_ + (highest - scratch_.maxima) * kBlock;
    const int64_t num_logits = std::min(kBlock, logits_ + vocab_size_ - first);
    const int64_t token_id = std::find(first, first + num_logits, *highest) - logits_;
    return {logits_[token_id], token_id};
}

int64_t Draw::sum(const Kept& kept) {
    int64_t total = 0;
    for (int64_t index = 0; index < num_blocks_; index++) {
        if (!has_maxima_) find_maximum<false>(index);
        const bool is_kept = scratch_.maxima[index] >= kept.at_least;
        scratch_.sums[index] = is_kept ? sum_block(index, kept) : 0;
        total += scratch_.sums[index];
    }
    has_maxima_ = true;
    return total;
}

int64_t Draw::sum_block(int64_t index, const Kept& kept) const {
    const float* logits = block(index);
    int64_t num_logits = kBlock;
    alignas(64) float few[kBlock + kStride];
    // Where not even every lane has a token that is kept they are few: look for them, then weigh.
    if (-max_lanes(-load(scratch_.lane_maxima + index * kLanes)) < kept.at_least) {
        num_logits = gather(logits, kBlock, kept.at_least, few);
        std::fill_n(few + num_logits, kStride, -kInfinity);
        logits = few;
    }
    return kept.min_weight > 0 ? sum_of<true>(logits, num_logits, kept)
                               : sum_of<false>(logits, num_logits, kept);
}

template <bool has_min_weight>
int64_t Draw::sum_of(const float* logits, int64_t num_logits, const Kept& kept) const {
    WholeSum sum;
    for (int64_t i = 0; i < num_logits; i += kStride) {
        f32v weights[kNumChains];
        load_each(logits + i, weights);
        weighing_.weigh(weights);
        times<kNumChains>([&](auto j) PF_EACH {
            weights[j] = kept.of<has_min_weight>(load(logits + i + j * kLanes), weights[j]);
        });
        sum.add(weights);
    }
    return sum.total();
}

void Draw::find_candidates(float cut) {
    candidates_.clear();
    for (int64_t index = 0; index < num_blocks_; index++)
        if (scratch_.maxima[index] >= cut) candidates_.add(block(index), kBlock, cut);
}

float Draw::find_top_k(int64_t top_k, float floor) {
    if (!has_maxima_)
        for (int64_t index = 0; index < num_blocks_; index++) find_maximum<false>(index);
    has_maxima_ = true;
    const auto goal = static_cast<double>(top_k);
    const float cut = std::max(floor, guess_top_k(goal, floor));
    find_candidates(cut);
    candidates_.count_ones();
    if (cut > floor && static_cast<double>(candidates_.total()) < goal) {
        find_candidates(floor);
        candidates_.count_ones();
    }
    return candidates_.select(goal);
}

float Draw::guess_top_k(double top_k, float floor) {
    const auto num_blocks = static_cast<double>(num_blocks_);
    double goal = top_k;
    candidates_.clear();
    // The k-th highest of some of the logits is no higher than that of all.
    if (2 * top_k <= num_blocks) {
        candidates_.add(scratch_.maxima, num_blocks_, floor);
    } else if (2 * top_k <= num_blocks * kLanes) {
        candidates_.add(scratch_.lane_maxima, num_blocks_ * kLanes, floor);
    } else {
        goal = 2 * top_k * add_sample(floor);
    }
    candidates_.count_ones();
    return candidates_.select(goal);
}

float Draw::find_top_p(double top_p, float from, float floor) {
    const auto total = static_cast<double>(sum({from, 0.0f}));
    const double goal = top_p * total;
    const float lowest = std::max(from, floor);
    const float cut = std::max(lowest, guess_top_p(total - goal, lowest));
    find_candidates(cut);
    candidates_.count_weights(weighing_);
    if (cut > lowest && static_cast<double>(candidates_.total()) < goal) {
        find_candidates(lowest);
        candidates_.count_weights(weighing_);
    }
    return candidates_.select(goal);
}

float Draw::guess_top_p(double rest, float lowest) {
    candidates_.clear();
    const double rest_sampled = rest * add_sample(lowest);
    candidates_.count_weights(weighing_);
    return candidates_.select(static_cast<double>(candidates_.total()) - rest_sampled / 2);
}

double Draw::add_sample(float lowest) {
    for (int64_t index = 0; index < num_whole_; index++)
        candidates_.add(block(index) + index * kLanes % kBlock, kLanes, lowest);
    return static_cast<double>(num_whole_ * kLanes) / static_cast<double>(vocab_size_);
}

int64_t Draw::find(const Kept& kept, int64_t target) const {
    for (int64_t index = 0; index < num_blocks_; index++) {
        if (scratch_.sums[index] > target) return find_in_block(index, kept, target);
        target -= scratch_.sums[index];
    }
    return -1;
}

int64_t Draw::find_in_block(int64_t index, const Kept& kept, int64_t target) const {
    const float* logits = block(index);
    int32_t high[kLanes], low[kLanes];
    for (int64_t i = 0; i < kBlock; i += kLanes) {
        const f32v values = load(logits + i);
        f32v weights[1] = {values};
        weighing_.weigh(weights);
        weights[0] = kept.of<true>(values, weights[0]);
        i32v highs[1], lows[1];
        WholeSum::split(weights, highs, lows);
        store_as(high, highs[0]);
        store_as(low, lows[0]);
        for (int lane = 0; lane < kLanes; lane++) {
            target -= WholeSum::join(high[lane], low[lane]);
            if (target < 0) return index * kBlock + i + lane;
        }
    }
    return -1;
}

int64_t Draw::draw(const DrawFilters& filters, double uniform) {
    const float floor = floor_of(filters.min_p);
    Kept kept{floor_of(0.0), 0.0f};
    if (filters.top_k < vocab_size_)
        kept.at_least = std::max(kept.at_least, find_top_k(filters.top_k, kept.at_least));
    if (filters.top_p < 1.0)
        kept.at_least = std::max(kept.at_least, find_top_p(filters.top_p, kept.at_least, floor));
    kept = {std::max(kept.at_least, floor), filters.min_p * kHalfOne};
    const auto total = static_cast<double>(sum(kept));
    // No uniform is above 1 - 2^-53, and that times a double rounds to less than the double.
    return find(kept, static_cast<int64_t>(uniform * total));
}

}  // namespace

int64_t draw_scratch_bytes(int64_t vocab_size) {
    return static_cast<int64_t>(Scratch(nullptr, vocab_size).end());
}

int64_t draw_token(const DrawRow& row, const DrawFilters& filters, double uniform, void* scratch) {
    Draw draw(row.logits, row.vocab_size, scratch);
    draw.weigh_by({row.best, row.temperature});
    return draw.draw(filters, uniform);
}

BestToken best_token(const float* logits, int64_t vocab_size, void* scratch) {
    return Draw(logits, vocab_size, scratch).find_best();
}

BestToken draw_token(const float* logits, int64_t vocab_size, const DrawTerms& terms,
                     void* scratch) {
    Draw draw(logits, vocab_size, scratch);
    const BestToken best = draw.find_best();
    if (!std::isfinite(best.logit)) return best;
    draw.weigh_by({best.logit, terms.temperature});
    return {best.logit, draw.draw(terms.filters, terms.uniform)};
}

int64_t total_weight(const DrawRow& row, void* scratch) {
    Draw draw(row.logits, row.vocab_size, scratch);
    draw.weigh_by({row.best, row.temperature});
    return draw.total();
}

}  // namespace pf
