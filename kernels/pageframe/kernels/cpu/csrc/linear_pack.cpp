// Weights from row-major matrices into panels.
#include <cstring>

#include "linear.h"

namespace pf {

namespace {

// Inputs packed at a time: the lines of a panel that are being written stay in the first-level cache.
constexpr int64_t kBlockInputs = 128;

int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t steps_of(const pf_linear_shape& shape) {
    return shape.dtype == PF_BF16 ? cdiv(shape.num_in, 2) : shape.num_in;
}

int64_t panels_bytes(const pf_linear_shape& shape) {
    return linear_num_panels(shape) * steps_of(shape) * kPanel * 4;
}

// Where an output of one matrix lies: its panel and its lane in it.
struct Place {
    int64_t panel;
    int64_t lane;
};

Place place_of(const pf_linear_shape& shape, int part, int64_t out) {
    const int64_t per_part = shape.gated ? kLanes : kPanel;
    return {out / per_part, out % per_part + part * kLanes};
}

float as_float(float value) { return value; }
float as_float(bf16 value) { return to_f32(value); }
void put(float* to, float value) { *to = value; }
void put(bf16* to, float value) { *to = to_bf16(value); }

// Inputs [begin, end) of one output. `per_step` inputs of a lane lie side by side.
template <class To, class From>
void pack_row(To* panel, int64_t lane, const From* row, int64_t begin, int64_t end) {
    constexpr int64_t kPerStep = sizeof(float) / sizeof(To);
    for (int64_t k = begin; k < end; k++) {
        const int64_t step = k / kPerStep;
        put(panel + (step * kPanel + lane) * kPerStep + k % kPerStep, as_float(row[k]));
    }
}

template <class To, class From>
void pack_matrix(const pf_linear_shape& shape, To* panels, int part, int64_t first_out,
                 int64_t num_rows, const From* weights, int64_t stride) {
    const int64_t panel_size = linear_panel_size(shape);
    const int64_t per_part = shape.gated ? kLanes : kPanel;
    int64_t end = 0;
    for (int64_t begin = 0; begin < num_rows; begin = end) {
        // The rows of one panel.
        const Place place = place_of(shape, part, first_out + begin);
        end = begin + per_part - (place.lane - part * kLanes);
        if (end > num_rows) end = num_rows;
        To* panel = panels + place.panel * panel_size;
        for (int64_t k = 0; k < shape.num_in; k += kBlockInputs) {
            const int64_t k_end = k + kBlockInputs < shape.num_in ? k + kBlockInputs : shape.num_in;
            for (int64_t row = begin; row < end; row++)
                pack_row(panel, place.lane + row - begin, weights + row * stride, k, k_end);
        }
    }
}

}  // namespace

int64_t linear_num_panels(const pf_linear_shape& shape) {
    return cdiv(shape.num_out, shape.gated ? kLanes : kPanel);
}

int64_t linear_panel_size(const pf_linear_shape& shape) {
    return steps_of(shape) * kPanel * (shape.dtype == PF_BF16 ? 2 : 1);
}

const float* linear_bias(const pf_linear_shape& shape, const void* packed) {
    if (!shape.has_bias) return nullptr;
    return reinterpret_cast<const float*>(static_cast<const char*>(packed) + panels_bytes(shape));
}

int64_t linear_packed_bytes(const pf_linear_shape& shape) {
    const int64_t bias_bytes = shape.has_bias ? linear_num_panels(shape) * kPanel * 4 : 0;
    return panels_bytes(shape) + bias_bytes;
}

void linear_pack_rows(const pf_linear_shape& shape, void* packed, int part, int64_t first_out,
                      int64_t num_rows, const void* weights, int weights_dtype, int64_t stride) {
    const auto pack = [&](auto* panels, const auto* from) {
        pack_matrix(shape, panels, part, first_out, num_rows, from, stride);
    };
    const auto* floats = static_cast<const float*>(weights);
    const auto* halves = static_cast<const bf16*>(weights);
    if (shape.dtype == PF_F32 && weights_dtype == PF_F32) pack(static_cast<float*>(packed), floats);
    if (shape.dtype == PF_F32 && weights_dtype == PF_BF16) pack(static_cast<float*>(packed), halves);
    if (shape.dtype == PF_BF16 && weights_dtype == PF_F32) pack(static_cast<bf16*>(packed), floats);
    if (shape.dtype == PF_BF16 && weights_dtype == PF_BF16) pack(static_cast<bf16*>(packed), halves);
}

void linear_pack_bias(const pf_linear_shape& shape, void* packed, int part, int64_t first_out,
                      int64_t num_values, const float* bias) {
    auto* to = const_cast<float*>(linear_bias(shape, packed));
    for (int64_t i = 0; i < num_values; i++) {
        const Place place = place_of(shape, part, first_out + i);
        to[place.panel * kPanel + place.lane] = bias[i];
    }
}

}  // namespace pf
