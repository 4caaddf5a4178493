// Which cores the threads of a pool are on, so that no two share one while another is free.
//
// A thread that wakes up while all cores are taken is put behind one that runs, which may be one of
// its own pool. Linux leaves the two there for 10 ms and more, though the core that was taken has
// long become free: both were there a moment ago, so their caches count as warm. So now and then,
// when it begins a phase, each thread says where it is and looks at one other. Who finds itself on
// that one's core goes to a core that none of the pool is on.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

namespace pf {

class Seats {
public:
    // `num_threads` >= 2 places, all empty.
    explicit Seats(int num_threads);

    // Thread `index`, which holds no task, begins phase `phase`.
    void take(int index, uint32_t phase);
    // Thread `index` is about to sleep, or leaves the run.
    void leave(int index);

private:
    using Clock = std::chrono::steady_clock;

    struct alignas(64) Seat {
        std::atomic<int> core{-1};
        Clock::time_point next_move{};  // its own thread's
    };

    void move(Seat& seat);

    int num_seats_;
    std::unique_ptr<Seat[]> seats_;
};

}  // namespace pf
