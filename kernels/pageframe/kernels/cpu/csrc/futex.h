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
    // Returns the value once it differs from `value`. Spins for about 50 us before it sleeps.
    uint32_t wait_while(uint32_t value);
    // As set, but by compare-and-swap; false when the value was another one.
    bool swap(uint32_t from, uint32_t to);

private:
    void wake();

    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> num_sleepers_{0};
};

}  // namespace pf
