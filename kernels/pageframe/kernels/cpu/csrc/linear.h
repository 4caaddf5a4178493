// Linear layers on packed weights: y = x W^T (+ bias), with what follows it folded in.
//
// **Packed form.** Outputs go in panels of kPanel = 2 * kLanes, each panel walks the inputs once:
//
//     float32:  panel p = [num_in]       [kPanel]      W[p * kPanel + lane][k]
//     bf16:     panel p = [num_in / 2 up][kPanel][2]   W[p * kPanel + lane][2 k], [2 k + 1]
//
// Outputs past num_out are zero rows. A gated layer (gate and up of a SwiGLU) has kLanes gate outputs
// and the kLanes up outputs of the same places in one panel, so that one tile has both.
// Its num_out is that of the result: 1536 for gate [1536, K] and up [1536, K].
//
// **Order of sums.** Each output is one chain of fused multiply-adds over k = 0, 1, 2 .. (bf16: in
// pairs, odd before even), then + bias, then the epilogue. Tiles, threads and K-blocks change when a
// link is computed, never the chain: a row's bits depend on that row and W alone.
#pragma once

#include <cstdint>

#include "pageframe_cpu.h"
#include "pool.h"
#include "simd.h"

namespace pf {

inline constexpr int kPanel = 2 * kLanes;

// Whether the machine multiplies pairs of bf16. PF_PAIR_ROWS has the portable twin do it, for tests.
#if defined(__AVX512BF16__) || defined(PF_PAIR_ROWS)
inline constexpr bool kPairRows = true;
#else
inline constexpr bool kPairRows = false;
#endif

// See pf_row_dtype.
constexpr int32_t row_dtype(int32_t weights_dtype) {
    return kPairRows && weights_dtype == PF_BF16 ? PF_BF16 : PF_F32;
}

// Bytes of the packed form of `shape`, bias included. The buffer must be 64-byte aligned and zeroed
// before the first row is packed (pf_alloc gives both).
int64_t linear_packed_bytes(const pf_linear_shape& shape);

// The packed form's measures: panels, values from a panel to the next, where the bias begins (null
// if there is none; [num_panels][kPanel], in the order of lanes).
int64_t linear_num_panels(const pf_linear_shape& shape);
int64_t linear_panel_size(const pf_linear_shape& shape);
const float* linear_bias(const pf_linear_shape& shape, const void* packed);

// Packs rows [first_out, first_out + num_rows) of one matrix: q, k and v may come one after another
// into one layer. `part` is 0, or 1 for the up matrix of a gated layer. `weights` is row-major
// [num_rows, num_in], `stride` in elements. A change of dtype rounds to the nearest.
void linear_pack_rows(const pf_linear_shape& shape, void* packed, int part, int64_t first_out,
                      int64_t num_rows, const void* weights, int weights_dtype, int64_t stride);

// Packs bias values of outputs [first_out, first_out + num_values); `shape.has_bias` must be set.
void linear_pack_bias(const pf_linear_shape& shape, void* packed, int part, int64_t first_out,
                      int64_t num_values, const float* bias);

// How many tasks a call has; each is a tile of rows and panels and writes only its own outputs.
int64_t linear_num_tasks(const pf_linear_call& call, int num_threads);
void linear_task(const pf_linear_call& call, int num_threads, int64_t task);

// The whole call as one phase of a run; `call` is the same on every thread.
inline void linear(Worker& worker, const pf_linear_call& call) {
    const int num_threads = worker.num_threads();
    worker.parallel_for(linear_num_tasks(call, num_threads),
                        [&](int64_t task) { linear_task(call, num_threads, task); });
}

}  // namespace pf
