// A number to wait on: spin a little, then sleep.
#pragma once

#include <atomic>
#include <cstdint>

namespace pf {

class Signal {
public:
    uint32_t load() const { return value_.load(std::memory_order_acquire); }
    // Writes and wakes all who wait; a system call only if somebody sleeps.
    void set(uint32_t value);
    // Returns the value once it differs from `value`. Spins for about 50 us, then calls
    // `before_sleep()` and sleeps.
    template <class BeforeSleep>
    uint32_t wait_while(uint32_t value, BeforeSleep&& before_sleep) {
        const uint32_t now = spin_while(value);
        if (now != value) return now;
        before_sleep();
        return sleep_while(value);
    }
    uint32_t wait_while(uint32_t value) {
        return wait_while(value, [] {});
    }
    // As set, but by compare-and-swap; false when the value was another one.
    bool swap(uint32_t from, uint32_t to);

private:
    // Gives up after about 50 us, and returns `value` then.
    uint32_t spin_while(uint32_t value) const;
    uint32_t sleep_while(uint32_t value);
    void wake();

    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> num_sleepers_{0};
};

}  // namespace pf
