// What a running softmax needs of vectors.
#pragma once

#include <utility>

#include "simd.h"

namespace pf {
namespace crossing {

template <int distance, int... j>
PF_INLINE f32v swap(f32v v, std::integer_sequence<int, j...>) {
    return __builtin_shufflevector(v, v, (j ^ distance)...);
}

template <int distance>
PF_INLINE f32v max_from(f32v v) {
    if constexpr (distance == 0) return v;
    return max_from<distance / 2>(max(v, swap<distance>(v, std::make_integer_sequence<int, kLanes>{})));
}

}  // namespace crossing

// The largest lane, in every lane.
PF_INLINE f32v max_everywhere(f32v v) { return crossing::max_from<kLanes / 2>(v); }

// e to the power x for x <= 0, within 2 units in the last place down to e^-87; from there on 2^-126,
// which is nothing beside the 1 of the largest score. NaN for NaN. Two thirds of the work of `exp`:
// one bound, and the power of two made by one shift, as its bias is in the number that rounds.
PF_INLINE f32v exp_below_one(f32v x) {
    x = select(x < splat(-87.0f), splat(-87.0f), x);
    const f32v magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32v shifted = fma(x, splat(1.44269504088896341f), magic);
    const f32v n = shifted - magic;
    f32v r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    return p * (f32v)((i32v)shifted << 23);
}

}  // namespace pf
