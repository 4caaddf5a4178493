#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "simd.h"

namespace pf {
namespace {

// `count` may be any number of lanes from 1 up; only the last vector of a row has fewer than all.
template <class T>
PF_INLINE f32v load_some(const T* from, int64_t count) {
    return count >= kLanes ? load(from) : load_first(from, count);
}

template <class T>
PF_INLINE void store_some(T* to, f32v value, int64_t count) {
    if (count >= kLanes)
        store(to, value);
    else
        store_first(to, value, count);
}

template <class T>
void scale_row(const float* x, const float* weight, float factor, int64_t count, T* to) {
    for (int64_t c = 0; c < count; c += kLanes) {
        const f32v scaled = load_some(x + c, count - c) * splat(factor);
        store_some(to + c, scaled * load_some(weight + c, count - c), count - c);
    }
}

}  // namespace

void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, void* to,
              int32_t to_dtype) {
    f32v squares[4] = {};
    int64_t c = 0;
    for (; c + 4 * kLanes <= count; c += 4 * kLanes)
        for (int i = 0; i < 4; i++) {
            const f32v part = load(x + c + i * kLanes);
            squares[i] = fma(part, part, squares[i]);
        }
    for (; c < count; c += kLanes) {
        const f32v part = load_some(x + c, count - c);
        squares[0] = fma(part, part, squares[0]);
    }
    const float sum = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + epsilon);
    if (to_dtype == PF_BF16)
        scale_row(x, weight, factor, count, static_cast<bf16*>(to));
    else
        scale_row(x, weight, factor, count, static_cast<float*>(to));
}

void rotary_angles(int64_t position, const float* frequencies, int64_t count, float* cosines,
                   float* sines) {
    const auto at = static_cast<float>(position);
    for (int64_t i = 0; i < count; i++) {
        const float angle = at * frequencies[i];
        cosines[i] = std::cos(angle);
        sines[i] = std::sin(angle);
    }
}

void rotate(float* head, const float* cosines, const float* sines, int64_t head_dim, float scale) {
    const int64_t half = head_dim / 2;
    const f32v factor = splat(scale);
    for (int64_t c = 0; c < half; c += kLanes) {
        const f32v cosine = load_some(cosines + c, half - c), sine = load_some(sines + c, half - c);
        const f32v low = load_some(head + c, half - c);
        const f32v high = load_some(head + half + c, half - c);
        store_some(head + c, fma(-high, sine, low * cosine) * factor, half - c);
        store_some(head + half + c, fma(low, sine, high * cosine) * factor, half - c);
    }
}

void unpack_row(const pf_linear_weights& weights, int64_t row, float* to) {
    const int64_t num_in = weights.shape.num_in, lane = row % kPanel;
    const int64_t panel = row / kPanel * linear_panel_size(weights.shape);
    if (weights.shape.dtype == PF_F32) {
        const float* from = static_cast<const float*>(weights.packed) + panel;
        for (int64_t k = 0; k < num_in; k++) to[k] = from[k * kPanel + lane];
        return;
    }
    const bf16* from = static_cast<const bf16*>(weights.packed) + panel;
    for (int64_t k = 0; k < num_in; k++)
        to[k] = to_f32(from[(k / 2 * kPanel + lane) * 2 + k % 2]);
}

void read_row(const void* table, int32_t dtype, int64_t row, int64_t count, float* to) {
    if (dtype == PF_F32) {
        const float* from = static_cast<const float*>(table) + row * count;
        std::copy(from, from + count, to);
        return;
    }
    const bf16* from = static_cast<const bf16*>(table) + row * count;
    for (int64_t c = 0; c < count; c++) to[c] = to_f32(from[c]);
}

void round_row(const float* from, int64_t count, uint16_t* to) {
    for (int64_t c = 0; c < count; c += kLanes)
        store_some(to + c, load_some(from + c, count - c), count - c);
}

}  // namespace pf
