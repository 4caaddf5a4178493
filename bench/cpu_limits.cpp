// What this machine can do at most: fused multiply-adds of one thread, and reading memory with some.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "simd.h"

#define PF_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kNumSums = 12;  // more than the latency of the unit times its width, less than registers
constexpr int64_t kBatchBytes = kNumSums * pf::kLanes * 4;  // 768 is a multiple of each width's

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Does not run while another process has the core.
double own_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Calls body(thread) on `num_threads` threads, the caller's among them, once all are there. Seconds
// from then on until the last is done; with one thread, its own. Who waits keeps its core: one that
// gave it to another process would begin late.
template <class Body>
double run_at_once(int num_threads, const Body& body) {
    if (num_threads == 1) {
        const double start = own_seconds();
        body(0);
        return own_seconds() - start;
    }
    std::atomic<int> num_missing{num_threads - 1};
    std::atomic<bool> is_open{false};
    std::vector<double> ends(num_threads);
    std::vector<std::thread> others;
    for (int thread = 1; thread < num_threads; thread++)
        others.emplace_back([&, thread] {
            num_missing--;
            while (!is_open) {}
            body(thread);
            ends[thread] = seconds();
        });
    while (num_missing) {}
    const double start = seconds();
    is_open = true;
    body(0);
    ends[0] = seconds();
    for (auto& other : others) other.join();
    return *std::max_element(ends.begin(), ends.end()) - start;
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

float total_of(const pf::f32v (&sums)[kNumSums]) {
    pf::f32v all{};
    for (const auto& sum : sums) all += sum;
    float total = 0;
    for (int lane = 0; lane < pf::kLanes; lane++) total += all[lane];
    return total;
}

float read(const uint8_t* memory, int64_t num_bytes) {
    pf::f32v sums[kNumSums] = {};
    for (int64_t byte = 0; byte < num_bytes; byte += kBatchBytes)
        add_batch(reinterpret_cast<const float*>(memory + byte), sums);
    return total_of(sums);
}

// While one piece is read the next is asked for line by line, as attention does with blocks.
float read_pieces(const uint8_t* memory, const int64_t* places, int64_t num_pieces,
                  int64_t piece_bytes) {
    pf::f32v sums[kNumSums] = {};
    for (int64_t piece = 0; piece < num_pieces; piece++) {
        const uint8_t* at = memory + places[piece];
        const uint8_t* next = memory + places[std::min(piece + 1, num_pieces - 1)];
        for (int64_t byte = 0; byte < piece_bytes; byte += kBatchBytes) {
            for (int64_t line = 0; line < kBatchBytes; line += pf::kLineBytes)
                pf::prefetch_near(next + byte + line);
            add_batch(reinterpret_cast<const float*>(at + byte), sums);
        }
    }
    return total_of(sums);
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

// Thread t reads bytes [starts[t], starts[t + 1]) from end to end, a multiple of 768; totals[t]
// becomes the sum of its floats. Returns seconds.
PF_EXPORT double limits_read(const uint8_t* memory, const int64_t* starts, int32_t num_threads,
                             float* totals) {
    return run_at_once(num_threads, [=](int thread) {
        const int64_t start = starts[thread];
        totals[thread] = read(memory + start, starts[thread + 1] - start);
    });
}

// Thread t reads pieces [starts[t], starts[t + 1]) of `piece_bytes` (a multiple of 768), which lie
// anywhere: `places` bytes from `memory`. totals[t] becomes the sum of its floats. Returns seconds.
PF_EXPORT double limits_read_pieces(const uint8_t* memory, const int64_t* places,
                                    int64_t piece_bytes, const int64_t* starts,
                                    int32_t num_threads, float* totals) {
    return run_at_once(num_threads, [=](int thread) {
        const int64_t start = starts[thread];
        totals[thread] = read_pieces(memory, places + start, starts[thread + 1] - start, piece_bytes);
    });
}
