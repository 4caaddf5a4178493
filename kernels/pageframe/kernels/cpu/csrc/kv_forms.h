// How keys and values of a tile meet queries and weights: the factors of a product, and the product.
//
// A form names the vectors that a vector of stored words makes, and what is added up in one step:
//
//     Singles<T>    channels as floats, one after another; a mix takes in a lane at a time
//     Pairs         bf16 pairs as they are, of two channels in a score, of two lanes in a mix
//
// A score is one chain over the channels of each kLanes words, in order; the sums of one such group
// after another are added up. So it has the same bits however many rows share a tile.
//
// `Pairs` is for machines that multiply pairs of bf16 and add up both products in float32. Queries
// and weights are rounded to bf16 for it, as any attention in bf16 rounds them.
#pragma once

#include "kv_words.h"
#include "linear.h"
#include "simd.h"

namespace pf {

template <class T>
struct Singles {
    static constexpr int kKeyParts = kPerWord<T>;    // vectors of key channels in a vector of words
    static constexpr int kValueParts = kPerWord<T>;  // of values
    static constexpr int kStepLanes = 1;             // lanes that one step of a mix takes in

    static PF_INLINE f32v key(f32v words, int part) { return channel_of<T>(words, part); }
    // Vector `v` of those that begin `offset` bytes into the rows of a step.
    static PF_INLINE f32v value(const uint8_t* const* rows, int64_t offset, int v) {
        return load_channel<T>(rows[0] + offset + v / kValueParts * 4 * kLanes, v % kValueParts);
    }
    static PF_INLINE f32v splat(const float* factor) { return pf::splat(*factor); }
    static PF_INLINE void add(f32v& sum, f32v a, f32v b) { fma_into(sum, a, b); }
    // Puts vector `v` of a row of weights where `splat` finds them; what they are now.
    static PF_INLINE f32v keep(float* row, int v, f32v weights) {
        store(row + v * kLanes, weights);
        return weights;
    }
};

struct Pairs {
    static constexpr int kKeyParts = 1;
    static constexpr int kValueParts = 2;
    static constexpr int kStepLanes = 2;

    static PF_INLINE f32v key(f32v words, int) { return words; }
    static PF_INLINE f32v value(const uint8_t* const* rows, int64_t offset, int v) {
        const int64_t at = offset + v / kValueParts * 4 * kLanes;
        const u32v even = load_as<u32v>(rows[0] + at), odd = load_as<u32v>(rows[1] + at);
        return (f32v)(v % kValueParts == 0 ? pairs_of_low(even, odd) : pairs_of_high(even, odd));
    }
    static PF_INLINE f32v splat(const float* factor) {
        uint32_t pair;
        std::memcpy(&pair, factor, sizeof pair);
        return (f32v)(pair - u32v{});
    }
    static PF_INLINE void add(f32v& sum, f32v a, f32v b) { sum = dot_pairs((u32v)a, (u32v)b, sum); }
    static PF_INLINE f32v keep(float* row, int v, f32v weights) {
        const u16v rounded = round_normal(weights);
        store_as(reinterpret_cast<bf16*>(row) + v * kLanes, rounded);
        return (f32v)(widen(rounded) << 16);
    }
};

// What of a vector of values belongs to lanes that are seen: all of it, or some bits of each lane.
struct AllOf {
    PF_INLINE f32v operator()(f32v values) const { return values; }
};
struct BitsOf {
    uint32_t bits;
    PF_INLINE f32v operator()(f32v values) const { return (f32v)((u32v)values & bits); }
};

// Calls use(step, seen) for the steps that lanes [low, high) are in. A weight of 0 would not keep out
// what is no number in the other lane of a pair.
template <class Form, class Use>
PF_INLINE void for_steps(int64_t low, int64_t high, Use&& use) {
    constexpr int kAtOnce = Form::kStepLanes;
    static_assert(kAtOnce == 1 || kAtOnce == 2);
    if constexpr (kAtOnce == 2)
        if (low % 2 != 0) use(low / 2, BitsOf{0xffff0000u});
    for (int64_t step = (low + kAtOnce - 1) / kAtOnce; step < high / kAtOnce; step++)
        use(step, AllOf{});
    if constexpr (kAtOnce == 2)
        if (high % 2 != 0) use(high / 2, BitsOf{0x0000ffffu});
}

// The form of a stored type on this machine.
template <class T>
struct FormOf {
    using Type = Singles<T>;
};
template <>
struct FormOf<bf16> {
    using Type = std::conditional_t<kPairRows, Pairs, Singles<bf16>>;
};

// Queries of this form are rounded to bf16, in words of two channels.
inline bool has_pairs(int32_t dtype) { return kPairRows && dtype == PF_BF16; }

}  // namespace pf
