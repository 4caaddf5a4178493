// What a running softmax needs of vectors.
#pragma once

#include "simd.h"

namespace pf {
namespace crossing {

template <int distance>
PF_INLINE f32v max_from(f32v v) {
    if constexpr (distance == 0) return v;
    return max_from<distance / 2>(max(v, pick<Swapped<distance>>(v)));
}

template <int lane>
struct Only {
    static constexpr int of(int) { return lane; }
};

}  // namespace crossing

// One lane, in every lane.
template <int lane>
PF_INLINE f32v splat_lane(f32v v) {
    return pick<crossing::Only<lane>>(v);
}

// The largest lane, in every lane.
PF_INLINE f32v max_everywhere(f32v v) { return crossing::max_from<kLanes / 2>(v); }

// e to the power x times 2^bits, within 2 units in the last place, for x in [-87, 0] and small bits;
// elsewhere anything. The power of two is made by one shift, as its bias is in the number that
// rounds. Of several vectors at once, each operation for all before the next: one such chain is four
// times as long as a core's look-ahead can fill.
template <int bits, int num>
PF_INLINE void exp_times(f32v (&x)[num]) {
    const f32v magic = splat(12582912.0f + 127.0f + bits);  // 1.5 * 2^23: adding it rounds to an integer
    f32v shifted[num], n[num], p[num];
    times<num>([&](auto i) PF_EACH { shifted[i] = fma(x[i], splat(1.44269504088896341f), magic); });
    times<num>([&](auto i) PF_EACH { n[i] = shifted[i] - magic; });
    times<num>([&](auto i) PF_EACH { x[i] = fma(n[i], splat(-0.693359375f), x[i]); });
    times<num>([&](auto i) PF_EACH { x[i] = fma(n[i], splat(2.12194440e-4f), x[i]); });
    times<num>([&](auto i) PF_EACH { p[i] = splat(1.9875691500e-4f); });
    times<num>([&](auto i) PF_EACH { p[i] = fma(p[i], x[i], splat(1.3981999507e-3f)); });
    times<num>([&](auto i) PF_EACH { p[i] = fma(p[i], x[i], splat(8.3334519073e-3f)); });
    times<num>([&](auto i) PF_EACH { p[i] = fma(p[i], x[i], splat(4.1665795894e-2f)); });
    times<num>([&](auto i) PF_EACH { p[i] = fma(p[i], x[i], splat(1.6666665459e-1f)); });
    times<num>([&](auto i) PF_EACH { p[i] = fma(p[i], x[i], splat(5.0000001201e-1f)); });
    times<num>([&](auto i) PF_EACH { p[i] = fma(p[i], x[i] * x[i], x[i]) + 1.0f; });
    times<num>([&](auto i) PF_EACH { x[i] = p[i] * (f32v)((i32v)shifted[i] << 23); });
}

// e to the power x for x <= 0, within 2 units in the last place down to e^-87; from there on 2^-126,
// which is nothing beside the 1 of the largest score. NaN for NaN. Two thirds of the work of `exp`.
template <int num>
PF_INLINE void exp_below_one(f32v (&x)[num]) {
    times<num>([&](auto i) PF_EACH { x[i] = max(splat(-87.0f), x[i]); });
    exp_times<0>(x);
}

PF_INLINE f32v exp_below_one(f32v x) {
    f32v only[1] = {x};
    exp_below_one(only);
    return only[0];
}

}  // namespace pf
