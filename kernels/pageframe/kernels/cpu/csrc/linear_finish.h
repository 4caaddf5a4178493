// What follows the sums of a linear layer: bias, SwiGLU, residual, rounding.
#pragma once

#include <cstdint>

#include "linear.h"
#include "simd.h"

namespace pf {

// Writes one vector of outputs: all of it, or as many as there are.
template <class Out>
PF_INLINE void put_outputs(Out* to, f32v value, int64_t count) {
    if (count >= kLanes)
        store(to, value);
    else if (count > 0)
        store_first(to, value, count);
}

PF_INLINE void add_outputs(float* to, f32v value, int64_t count) {
    if (count >= kLanes)
        store(to, load(to) + value);
    else if (count > 0)
        store_first(to, load_first(to, count) + value, count);
}

PF_INLINE void finish_vector(const pf_linear_call& call, int64_t row, int64_t out, f32v value) {
    const int64_t count = call.shape.num_out - out;
    const int64_t place = row * call.y_stride + out;
    if (call.y_dtype == PF_BF16)
        put_outputs(static_cast<bf16*>(call.y) + place, value, count);
    else if (call.epilogue == PF_ADD)
        add_outputs(static_cast<float*>(call.y) + place, value, count);
    else
        put_outputs(static_cast<float*>(call.y) + place, value, count);
}

// `sums` are the kPanel sums of one row and panel.
PF_INLINE void linear_finish(const pf_linear_call& call, int64_t row, int64_t panel, const float* sums) {
    f32v first = load(sums);
    f32v second = load(sums + kLanes);
    if (const float* bias = linear_bias(call.shape, call.packed)) {
        first += load(bias + panel * kPanel);
        second += load(bias + panel * kPanel + kLanes);
    }
    if (call.shape.gated) {
        finish_vector(call, row, panel * kLanes, silu(first) * second);
    } else {
        finish_vector(call, row, panel * kPanel, first);
        finish_vector(call, row, panel * kPanel + kLanes, second);
    }
}

}  // namespace pf
