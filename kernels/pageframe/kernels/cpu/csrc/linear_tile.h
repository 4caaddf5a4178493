// The innermost loops of a linear layer: tile[rows][outputs] += x[rows][k] * W[k][outputs].
//
// A tile lives in memory and in registers by turns, so that k may be cut into blocks which fit the
// first-level cache without a change to any chain of sums. A `Format` says how one step reads
// weights and rows; a step is one k for float32 weights and a pair of k for bf16 weights.
//
// Register blocking after Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication" (2008); rows are read where they lie, unpacked.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pf {

// Rows that one tile takes at most: with two vectors of outputs each, as many sums as the registers
// hold beside two weights and a value of a row.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileRows = 12;
#else
inline constexpr int kTileRows = 6;
#endif

// Panels that a tile of so many rows takes side by side: enough sums under way to hide the latency of
// a fused multiply-add (eight vectors), as far as their factors fit in registers too.
constexpr int panels_of(int num_rows) { return num_rows == 1 ? 4 : num_rows == 2 ? 2 : 1; }

// A format's step has kParts links of each chain; `weight` and `row` give a part's two factors, as
// vectors of `Factor`, and `add` puts their product on the sum.

// float32 weights and rows.
struct FloatFormat {
    using Row = float;
    using Weight = float;
    using Factor = f32v;
    static constexpr int kMaxRows = kTileRows;
    static constexpr int kInputsPerStep = 1;
    static constexpr int kParts = 1;

    static PF_INLINE Factor weight(const Weight* from, int) { return load(from); }
    static PF_INLINE Factor row(const Row* x, int) { return splat(*x); }
    static PF_INLINE void add(f32v& sum, Factor x, Factor w) { fma_into(sum, x, w); }
};

// Pairs of bf16 weights, widened; rows of float32. Odd before even, as dot_pairs.
struct WidenedFormat {
    using Row = float;
    using Weight = bf16;
    using Factor = f32v;
    static constexpr int kMaxRows = kTileRows;
    static constexpr int kInputsPerStep = 2;
    static constexpr int kParts = 2;

    static PF_INLINE Factor weight(const Weight* from, int part) {
        const u32v pairs = load_as<u32v>(from);
        return part == 0 ? odd_of_tile(pairs) : even_of(pairs);
    }
    static PF_INLINE Factor row(const Row* x, int part) { return splat(x[1 - part]); }
    static PF_INLINE void add(f32v& sum, Factor x, Factor w) { fma_into(sum, x, w); }
};

// Pairs of bf16 weights against pairs of bf16 inputs.
struct PairFormat {
    using Row = bf16;
    using Weight = bf16;
    using Factor = u32v;
    static constexpr int kMaxRows = kTileRows;
    static constexpr int kInputsPerStep = 2;
    static constexpr int kParts = 1;

    static PF_INLINE Factor weight(const Weight* from, int) { return load_as<u32v>(from); }
    static PF_INLINE Factor row(const Row* x, int) {
        uint32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return pair - u32v{};
    }
    static PF_INLINE void add(f32v& sum, Factor x, Factor w) { sum = dot_pairs(x, w, sum); }
};

// Where a tile reads and writes; strides in elements. `tile` is [rows][panels * 2 * kLanes].
template <class Format>
struct TileArgs {
    int64_t num_rows;
    const typename Format::Row* x;
    int64_t x_stride;
    const typename Format::Weight* weights;
    int64_t panel_stride;  // from a panel to the next
    int64_t num_steps;
    const char* ahead;  // what is fetched meanwhile, `ahead_step` bytes further with each step
    int64_t ahead_step;
    const float* before;  // what the sums are so far: `tile`, or kNoSums
    float* tile;
};

// Sums that begin.
alignas(64) inline constexpr float kNoSums[kTileRows * 2 * kLanes] = {};

// Weights of one step of one panel: floats, or pairs of bf16.
inline constexpr int64_t kStepBytes = 2 * kLanes * 4;
// Lines that they lie in.
inline constexpr int64_t kStepLines = kStepBytes > kLineBytes ? kStepBytes / kLineBytes : 1;

// One part of one step. Registers hold the factors of whichever side has fewer, and one of the other.
template <class Format, int kRows, int kVectors>
PF_INLINE void add_products(const typename Format::Row* x, int64_t x_stride,
                            const typename Format::Weight* weights, int64_t panel_stride, int part,
                            f32v (&sums)[kRows][kVectors]) {
    using Factor = typename Format::Factor;
    constexpr int kPerVector = kLanes * Format::kInputsPerStep;
    const auto weight_of = [&](int v) {
        return Format::weight(weights + (v / 2) * panel_stride + (v % 2) * kPerVector, part);
    };
    if constexpr (kRows >= kVectors) {
        Factor weight[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) weight[v] = weight_of(v);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) {
            const Factor row = Format::row(x + r * x_stride, part);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; v++) Format::add(sums[r][v], row, weight[v]);
        }
    } else {
        Factor row[kRows];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) row[r] = Format::row(x + r * x_stride, part);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) {
            const Factor weight = weight_of(v);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; r++) Format::add(sums[r][v], row[r], weight);
        }
    }
}

template <class Format, int kRows, int kPanels>
void accumulate(const TileArgs<Format>& args) {
    constexpr int kVectors = 2 * kPanels;
    constexpr int kTileStride = kVectors * kLanes;
    f32v sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++)
            sums[r][v] = load(args.before + r * kTileStride + v * kLanes);

    const typename Format::Row* x = args.x;
    const typename Format::Weight* weights = args.weights;
    const int64_t x_stride = args.x_stride;
    const int64_t panel_stride = args.panel_stride;
    const char* ahead = args.ahead;
    for (int64_t step = 0; step < args.num_steps; step++) {
        // Where panels stand side by side there is little to compute, and the machine looks ahead.
        if constexpr (kPanels == 1) {
            for (int64_t line = 0; line < kStepLines; line++) prefetch_passing(ahead + line * kLineBytes);
            ahead += args.ahead_step;
        }
#pragma GCC unroll 2
        for (int part = 0; part < Format::kParts; part++) {
            add_products<Format>(x, x_stride, weights, panel_stride, part, sums);
            // What is loaded for one part must not be kept for the next: there is no register left.
            asm volatile("" ::: "memory");
        }
        x += Format::kInputsPerStep;
        weights += 2 * kLanes * Format::kInputsPerStep;
    }

#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++)
            store(args.tile + r * kTileStride + v * kLanes, sums[r][v]);
}

}  // namespace pf
