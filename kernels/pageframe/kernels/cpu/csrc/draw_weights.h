// What a token weighs in a draw, and sums of that: whole numbers, so no order of adding matters.
#pragma once

#include <cstdint>

#include "simd.h"
#include "softmax.h"

namespace pf {

// The weight of the best token, as a whole number: 2^40, in two halves of 20 bits.
inline constexpr int kWeightBits = 40;
inline constexpr int kHalfBits = kWeightBits / 2;
inline constexpr float kHalfOne = 1 << kHalfBits;

// e to the power (logit - best) / temperature: in [0, 1], and here times 2^20, which changes no bit.
class Weighing {
public:
    Weighing(float best, float temperature) : best_(best), temperature_(temperature) {}

    // Makes weights of logits. Only where a weight is at least 2^-40; else anything.
    template <int num>
    PF_INLINE void weigh(f32v (&logits)[num]) const {
        // Dividing by one changes nothing, so temperature 1 is no case of its own.
        times<num>([&](auto i) PF_EACH { logits[i] = logits[i] - splat(best_); });
        times<num>([&](auto i) PF_EACH { logits[i] = logits[i] / splat(temperature_); });
        exp_times<kHalfBits>(logits);
    }

    // A logit below which everything weighs less than `weight`, in [2^-40, 1]. A little lower than
    // the highest such one: far enough for whatever `weigh` rounds away.
    float floor_of(double weight) const;

private:
    float best_;
    float temperature_;
};

// floor(weight * 2^40) of many weights, summed lane by lane. A weight has 24 bits: its whole and its
// fractional part at 2^20 are exact floats both, and so is the latter's product by 2^20.
class WholeSum {
public:
    // How many vectors the lanes surely hold: each adds at most 2^20 to a lane of 31 bits.
    static constexpr int64_t kNumVectorsMax = 1 << 10;

    // `weights` times 2^20, as `Weighing` has them.
    template <int num>
    PF_INLINE void add(const f32v (&weights)[num]) {
        i32v high[num], low[num];
        split(weights, high, low);
        times<num>([&](auto i) PF_EACH { high_ += high[i]; });
        times<num>([&](auto i) PF_EACH { low_ += low[i]; });
    }

    int64_t total() const {
        int32_t high[kLanes], low[kLanes];
        store_as(high, high_);
        store_as(low, low_);
        int64_t sum = 0;
        for (int lane = 0; lane < kLanes; lane++) sum += join(high[lane], low[lane]);
        return sum;
    }

    template <int num>
    PF_INLINE static void split(const f32v (&weights)[num], i32v (&high)[num], i32v (&low)[num]) {
        f32v rest[num];
        times<num>([&](auto i) PF_EACH { high[i] = __builtin_convertvector(weights[i], i32v); });
        times<num>([&](auto i) PF_EACH { rest[i] = __builtin_convertvector(high[i], f32v); });
        times<num>([&](auto i) PF_EACH { rest[i] = (weights[i] - rest[i]) * kHalfOne; });
        times<num>([&](auto i) PF_EACH { low[i] = __builtin_convertvector(rest[i], i32v); });
    }

    PF_INLINE static int64_t join(int32_t high, int32_t low) {
        return (static_cast<int64_t>(high) << kHalfBits) + low;
    }

private:
    i32v high_{}, low_{};
};

// Which tokens take part: their logit is at least so much, and their weight, times 2^20.
struct Kept {
    float at_least;
    float min_weight;

    // The weight of a logit, zero if it is dropped.
    template <bool has_min_weight>
    PF_INLINE f32v of(f32v logit, f32v weight) const {
        i32v keep = logit >= splat(at_least);
        if constexpr (has_min_weight) keep &= weight >= splat(min_weight);
        return (f32v)((i32v)weight & keep);
    }
};

}  // namespace pf
