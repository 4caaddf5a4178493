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

// `count` channels, a multiple of kLanes * kPerWord<T>, from their order to that by parts.
template <class T>
inline void order_by_parts(const float* channels, int64_t count, float* parts) {
    for (int64_t at = 0; at < count; at += kLanes * kPerWord<T>)
        for (int part = 0; part < kPerWord<T>; part++)
            for (int lane = 0; lane < kLanes; lane++)
                parts[at + part * kLanes + lane] = channels[at + lane * kPerWord<T> + part];
}

// The reverse, in place.
template <class T>
inline void order_by_channels(float* parts, int64_t count) {
    for (int64_t at = 0; at < count; at += kLanes * kPerWord<T>) {
        float block[kLanes * kPerWord<T>];
        std::memcpy(block, parts + at, sizeof block);
        for (int lane = 0; lane < kLanes; lane++)
            for (int part = 0; part < kPerWord<T>; part++)
                parts[at + lane * kPerWord<T> + part] = block[part * kLanes + lane];
    }
}

}  // namespace pf
