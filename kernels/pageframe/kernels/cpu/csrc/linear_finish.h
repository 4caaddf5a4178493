// What follows the sums of a linear layer: bias, SwiGLU, residual, rounding.
//
// What a call wants is looked up once for all rows of a panel; a row costs its arithmetic.
#pragma once

#include <cstdint>

#include "linear.h"
#include "simd.h"

namespace pf {

// Where `count` outputs go: to their place, or on top of what is there (a residual).
template <class Out>
struct StoreOutputs {
    Out* to;

    PF_INLINE void operator()(int64_t at, f32v value, int64_t count) const {
        count == kLanes ? store(to + at, value) : store_first(to + at, value, count);
    }
};

struct AddOutputs {
    float* to;

    PF_INLINE void operator()(int64_t at, f32v value, int64_t count) const {
        if (count == kLanes)
            store(to + at, load(to + at) + value);
        else
            store_first(to + at, load_first(to + at, count) + value, count);
    }
};

// Calls use(put) for where the outputs of a call go.
template <class Use>
PF_INLINE void with_outputs(const pf_linear_call& call, Use&& use) {
    if (call.y_dtype == PF_BF16) return use(StoreOutputs<bf16>{static_cast<bf16*>(call.y)});
    if (call.epilogue == PF_ADD) return use(AddOutputs{static_cast<float*>(call.y)});
    use(StoreOutputs<float>{static_cast<float*>(call.y)});
}

// Vectors of one panel, and how many outputs each has: kLanes, or fewer at the end of the layer.
template <bool is_gated>
struct PanelOutputs {
    static constexpr int kVectors = is_gated ? 1 : 2;

    PanelOutputs(const pf_linear_call& call, int64_t panel)
        : panel(panel), first(panel * kVectors * kLanes) {
        for (int v = 0; v < kVectors; v++) {
            const int64_t left = call.shape.num_out - first - v * kLanes;
            counts[v] = left < 0 ? 0 : left < kLanes ? left : kLanes;
        }
    }

    bool is_whole() const { return counts[kVectors - 1] == kLanes; }

    int64_t panel;
    int64_t first;
    int64_t counts[kVectors];
};

template <bool is_gated, bool is_whole, class Put>
void finish_rows(const pf_linear_call& call, int64_t row_begin, int64_t row_end,
                 const PanelOutputs<is_gated>& outputs, const float* sums, int64_t sum_stride,
                 Put put) {
    const float* bias = linear_bias(call.shape, call.packed);
    f32v biases[2] = {};
    for (int v = 0; bias != nullptr && v < 2; v++)
        biases[v] = load(bias + outputs.panel * kPanel + v * kLanes);
    for (int64_t row = row_begin; row < row_end; row++, sums += sum_stride) {
        f32v values[2] = {load(sums), load(sums + kLanes)};
        if (bias != nullptr)
            for (int v = 0; v < 2; v++) values[v] += biases[v];
        if (is_gated) values[0] = silu(values[0]) * values[1];
        const int64_t at = row * call.y_stride + outputs.first;
        for (int v = 0; v < outputs.kVectors; v++)
            put(at + v * kLanes, values[v], is_whole ? kLanes : outputs.counts[v]);
    }
}

// The outputs of rows [row_begin, row_end) in one panel, whose sums are `sum_stride` floats apart.
inline void linear_finish(const pf_linear_call& call, int64_t row_begin, int64_t row_end,
                          int64_t panel, const float* sums, int64_t sum_stride) {
    const auto finish = [&]<bool is_gated>(std::bool_constant<is_gated>) {
        const PanelOutputs<is_gated> outputs(call, panel);
        with_outputs(call, [&](auto put) {
            const auto use = outputs.is_whole() ? finish_rows<is_gated, true, decltype(put)>
                                                : finish_rows<is_gated, false, decltype(put)>;
            use(call, row_begin, row_end, outputs, sums, sum_stride, put);
        });
    };
    call.shape.gated ? finish(std::true_type{}) : finish(std::false_type{});
}

}  // namespace pf
