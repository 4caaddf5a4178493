// What happens to one token's row between linear layers. Each function is one row's work, so that
// the order of its sums depends on nothing else; model.cpp hands rows to threads.
#pragma once

#include <cstdint>

#include "pageframe_cpu.h"

namespace pf {

// to = x / sqrt(mean(x^2) + epsilon) * weight; `to` is PF_F32 or PF_BF16.
void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, void* to,
              int32_t to_dtype);

// cosines[i] and sines[i] of position * frequencies[i], in float32 as Hugging Face computes them.
void rotary_angles(int64_t position, const float* frequencies, int64_t count, float* cosines,
                   float* sines);

// Rotate one head in place, channel c with c + head_dim / 2, then multiply by `scale`.
void rotate(float* head, const float* cosines, const float* sines, int64_t head_dim, float scale);

// Row `row` of a weight matrix [num_out, num_in] in its packed form, or of a plain one.
void unpack_row(const pf_linear_weights& weights, int64_t row, float* to);
void read_row(const void* table, int32_t dtype, int64_t row, int64_t count, float* to);

// To bf16, to the nearest with ties to even.
void round_row(const float* from, int64_t count, uint16_t* to);

}  // namespace pf
