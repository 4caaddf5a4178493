#include "futex.h"

#include <chrono>
#include <climits>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pf {

namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
// The clock costs as much as a few pauses; look at it that seldom.
constexpr int kNumPausesPerLook = 16;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#if defined(__linux__)
void wait_for_change(std::atomic<uint32_t>* value, uint32_t expected) {
    // Returns at once if the value has changed already; may also return for no reason.
    syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>* value) {
    syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
void wait_for_change(std::atomic<uint32_t>*, uint32_t) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
}

void wake_all(std::atomic<uint32_t>*) {}
#endif

}  // namespace

// The sleeper counts itself, then looks at the value; the writer writes, then looks at the count.
// In one total order of the four, at least one of them sees the other.
void Signal::set(uint32_t value) {
    value_.store(value, std::memory_order_seq_cst);
    wake();
}

bool Signal::swap(uint32_t from, uint32_t to) {
    if (!value_.compare_exchange_strong(from, to, std::memory_order_seq_cst)) return false;
    wake();
    return true;
}

void Signal::wake() {
    if (num_sleepers_.load(std::memory_order_seq_cst) != 0) wake_all(&value_);
}

uint32_t Signal::spin_while(uint32_t value) const {
    uint32_t now = load();
    if (now != value) return now;
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < kNumPausesPerLook; i++) {
            pause();
            if ((now = load()) != value) return now;
        }
        // Another process may wait for this core; alone, this returns at once.
        std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < deadline);
    return value;
}

uint32_t Signal::sleep_while(uint32_t value) {
    uint32_t now;
    num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while ((now = value_.load(std::memory_order_seq_cst)) == value) wait_for_change(&value_, value);
    num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return now;
}

}  // namespace pf
