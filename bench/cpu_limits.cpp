// What this machine can do at most, one thread: fused multiply-adds, and reading memory.
#include <algorithm>
#include <chrono>
#include <cstdint>

#include "simd.h"

#define PF_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kNumSums = 12;  // more than the latency of the unit times its width, less than registers
constexpr int64_t kLineBytes = 64;
constexpr int64_t kBatchBytes = kNumSums * pf::kLanes * 4;  // 768 is a multiple of each width's

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The compiler must believe that the sums are looked at, and must not merge iterations.
void keep(pf::f32v (&sums)[kNumSums]) {
#pragma GCC unroll 16
    for (auto& sum : sums) asm volatile("" : "+x"(sum));
}

PF_INLINE void add_batch(const float* at, pf::f32v (&sums)[kNumSums]) {
#pragma GCC unroll 16
    for (int i = 0; i < kNumSums; i++) sums[i] += pf::load(at + i * pf::kLanes);
}

}  // namespace

// GFLOP/s of fused multiply-adds that wait for nothing.
PF_EXPORT double limits_gflops(int64_t num_rounds) {
    pf::f32v sums[kNumSums] = {};
    pf::f32v a = pf::splat(1.0001f), b = pf::splat(0.5f);
    asm volatile("" : "+x"(a), "+x"(b));
    const double start = seconds();
    for (int64_t round = 0; round < num_rounds; round++) {
#pragma GCC unroll 16
        for (auto& sum : sums) sum = pf::fma(a, b, sum);
        keep(sums);
    }
    return 2.0 * static_cast<double>(num_rounds) * kNumSums * pf::kLanes / (seconds() - start) / 1e9;
}

// GB/s of reading `num_bytes` (a multiple of 768) once, from end to end.
PF_EXPORT double limits_read(const float* memory, int64_t num_bytes) {
    pf::f32v sums[kNumSums] = {};
    const double start = seconds();
    const float* end = memory + num_bytes / 4;
    for (const float* at = memory; at < end; at += kNumSums * pf::kLanes) add_batch(at, sums);
    keep(sums);
    return static_cast<double>(num_bytes) / (seconds() - start) / 1e9;
}

// Reads pieces of `piece_bytes` (a multiple of 768) that lie anywhere, `places` bytes from `memory`.
// While one is read the next is asked for line by line, as attention does with blocks. The caller
// takes the time, as it does of attention. Returns the sum of all floats.
PF_EXPORT float limits_read_pieces(const uint8_t* memory, const int64_t* places, int64_t num_pieces,
                                   int64_t piece_bytes) {
    pf::f32v sums[kNumSums] = {};
    for (int64_t piece = 0; piece < num_pieces; piece++) {
        const uint8_t* at = memory + places[piece];
        const uint8_t* next = memory + places[std::min(piece + 1, num_pieces - 1)];
        for (int64_t byte = 0; byte < piece_bytes; byte += kBatchBytes) {
            for (int64_t line = 0; line < kBatchBytes; line += kLineBytes)
                pf::prefetch_near(next + byte + line);
            add_batch(reinterpret_cast<const float*>(at + byte), sums);
        }
    }
    pf::f32v all{};
    for (const auto& sum : sums) all += sum;
    float total = 0;
    for (int lane = 0; lane < pf::kLanes; lane++) total += all[lane];
    return total;
}
