// Channels of keys and values as they are stored, a 32-bit word at a time.
//
// A vector of words has one float32, two bf16 or four int8 channels in each lane. One shift or mask
// makes floats of all first channels, another of all second ones: cheaper than widening neighbours,
// which has to move them across lanes. What is computed in place therefore has channels *by parts*:
//
//     channels    0 1 | 2 3 | 4 5 | ..        words of two, as in bf16
//     by parts    0 2 4 ..    1 3 5 ..        kLanes each; then the next kLanes words
#pragma once

#include <cstdint>

#include "simd.h"

namespace pf {

template <class T>
inline constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

// Channel `part` of each lane's word, as a float.
template <class T>
PF_INLINE f32v channel_of(f32v words, int part) {
    if constexpr (sizeof(T) == 4) return words;
    if constexpr (sizeof(T) == 2) return part == 0 ? even_of((u32v)words) : odd_of((u32v)words);
    if constexpr (sizeof(T) == 1)
        return __builtin_convertvector((i32v)((u32v)words << (24 - 8 * part)) >> 24, f32v);
}

// The same from memory, where no register is left for a mask.
template <class T>
PF_INLINE f32v load_channel(const uint8_t* words, int part) {
    if constexpr (sizeof(T) == 2) {
        if (part == 1) return odd_of_tile(load_as<u32v>(words));
    }
    return channel_of<T>(load_as<f32v>(words), part);
}

namespace ordering {

// Of two vectors, every second lane from `first` on.
template <int first>
struct EverySecond {
    static constexpr int of(int j) { return 2 * j + first; }
};

// The lanes of both in turns, half of them from `first` on.
template <int first>
struct InTurns {
    static constexpr int of(int j) { return first / 2 + j / 2 + j % 2 * kLanes; }
};

// What kPerWord vectors in a row become; a word of four is a pair of pairs.
template <int per_word>
PF_INLINE void by_parts(f32v* v) {
    if constexpr (per_word == 1) return;
    if constexpr (per_word == 2) {
        const f32v even = pick<EverySecond<0>>(v[0], v[1]);
        v[1] = pick<EverySecond<1>>(v[0], v[1]);
        v[0] = even;
    }
    if constexpr (per_word == 4) {
        by_parts<2>(v);
        by_parts<2>(v + 2);
        f32v even[] = {v[0], v[2]}, odd[] = {v[1], v[3]};
        by_parts<2>(even);
        by_parts<2>(odd);
        v[0] = even[0], v[1] = odd[0], v[2] = even[1], v[3] = odd[1];
    }
}

template <int per_word>
PF_INLINE void by_channels(f32v* v) {
    if constexpr (per_word == 2) {
        const f32v low = pick<InTurns<0>>(v[0], v[1]);
        v[1] = pick<InTurns<kLanes>>(v[0], v[1]);
        v[0] = low;
    }
    if constexpr (per_word == 4) {
        f32v even[] = {v[0], v[2]}, odd[] = {v[1], v[3]};
        by_channels<2>(even);
        by_channels<2>(odd);
        v[0] = even[0], v[1] = odd[0], v[2] = even[1], v[3] = odd[1];
        by_channels<2>(v);
        by_channels<2>(v + 2);
    }
}

template <class T, class Order>
PF_INLINE void order(const float* from, int64_t count, float* to, Order&& order_word) {
    constexpr int kVectors = kPerWord<T>;
    for (int64_t at = 0; at < count; at += kVectors * kLanes) {
        f32v words[kVectors];
        for (int v = 0; v < kVectors; v++) words[v] = load(from + at + v * kLanes);
        order_word(words);
        for (int v = 0; v < kVectors; v++) store(to + at + v * kLanes, words[v]);
    }
}

}  // namespace ordering

// `count` channels, a multiple of kLanes * kPerWord<T>, from their order to that by parts, perhaps
// in place.
template <class T>
inline void order_by_parts(const float* channels, int64_t count, float* parts) {
    ordering::order<T>(channels, count, parts, ordering::by_parts<kPerWord<T>>);
}

// The reverse.
template <class T>
inline void order_by_channels(const float* parts, int64_t count, float* channels) {
    ordering::order<T>(parts, count, channels, ordering::by_channels<kPerWord<T>>);
}

}  // namespace pf
