// Finding the lowest logit that a filter keeps, without sorting.
//
// top-k and top-p ask the same: the highest logit such that what is at least as high has so much in
// all. What is summed is a weight for top-p, one each for top-k.
//
//     candidates ─▶ 256 buckets of equal width ─▶ the bucket that holds the answer
//                ─▶ a pivot splits it, the sum of the upper side tells which side holds the answer,
//                   and so on (quickselect; Hoare, 1961)
#pragma once

#include <cstdint>

#include "draw_weights.h"

namespace pf {

// Writes those of `num_logits` logits that are at least `cut`, which is finite, one behind the other;
// returns how many. Both arrays may be read or written up to a whole vector.
int64_t gather(const float* logits, int64_t num_logits, float cut, float* to);

// Some logits of a row, all finite, and what each counts. Memory is the owner's, with room for one
// vector more than there can be candidates.
class Candidates {
public:
    Candidates(float* logits, float* counts) : logits_(logits), counts_(counts) {}

    void clear() { num_ = 0; }

    // Adds those of `num_logits` logits that are at least `cut`.
    void add(const float* logits, int64_t num_logits, float cut) {
        num_ += gather(logits, num_logits, cut, logits_ + num_);
    }

    // Each counts one.
    void count_ones();

    // Each counts its weight.
    void count_weights(const Weighing& weighing);

    int64_t total() const { return num_from(-__builtin_inff()); }

    // The highest logit such that what is at least as high counts `goal` at least; minus infinity
    // where all together do not. Nothing but `clear` may follow.
    float select(double goal);

private:
    // Buckets of equal width, highest logits first. Rounding moves a border, but all that is above
    // one stays above it.
    struct Buckets {
        static constexpr int kNum = 256;

        PF_INLINE i32v of(f32v logits) const {
            const f32v distance = (splat(highest) - logits) * splat(per_logit);
            return __builtin_convertvector(min(distance, splat(kNum - 1)), i32v);
        }

        float highest;
        float per_logit;
    };

    // Drops all but the bucket that holds the answer; how much counted what was above that.
    int64_t narrow(double goal);
    Buckets spread() const;
    int64_t num_from(float pivot) const;  // count of what is at least the pivot
    template <bool keeps_above>
    void keep(float pivot);
    float pick_pivot();
    void pad();

    float* logits_;
    float* counts_;
    int64_t num_ = 0;
    uint32_t random_ = 1;
};

}  // namespace pf
