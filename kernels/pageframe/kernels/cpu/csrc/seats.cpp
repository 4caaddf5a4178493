#include "seats.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace pf {

namespace {

// The shortest phases take 25 us; a look in each would cost a hundredth of them.
constexpr uint32_t kNumPhasesPerLook = 4;
// A system that puts a thread back, or refuses to move it, is not asked all the time.
constexpr auto kBetweenMoves = std::chrono::milliseconds(1);

#if defined(__linux__)
int current_core() { return sched_getcpu(); }

// Has the system run this thread on a core that is not taken, if it may use any.
template <class Taken>
void leave_cores(const Taken& for_each_taken) {
    cpu_set_t allowed;
    // Fails where there are more cores than the set has places for.
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
    cpu_set_t free = allowed;
    for_each_taken([&](int core) { CPU_CLR(core, &free); });
    if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof(free), &free) != 0) return;
    // It is there now, and may be anywhere again.
    sched_setaffinity(0, sizeof(allowed), &allowed);
}
#else
int current_core() { return -1; }

template <class Taken>
void leave_cores(const Taken&) {}
#endif

}  // namespace

Seats::Seats(int num_threads) : num_seats_(num_threads), seats_(new Seat[num_threads]) {}

void Seats::take(int index, uint32_t phase) {
    if (phase % kNumPhasesPerLook != 0) return;
    Seat& seat = seats_[index];
    const int core = current_core();
    if (seat.core.load(std::memory_order_relaxed) != core)
        seat.core.store(core, std::memory_order_relaxed);
    // One after the other: how many there are does not make a look dearer.
    const uint32_t look = phase / kNumPhasesPerLook;
    const auto step = 1 + static_cast<int>(look % static_cast<uint32_t>(num_seats_ - 1));
    const Seat& other = seats_[(index + step) % num_seats_];
    if (core >= 0 && other.core.load(std::memory_order_relaxed) == core) move(seat);
}

void Seats::leave(int index) { seats_[index].core.store(-1, std::memory_order_relaxed); }

void Seats::move(Seat& seat) {
    const auto now = Clock::now();
    if (now < seat.next_move) return;
    seat.next_move = now + kBetweenMoves;
    // The other one runs as soon as this one is on its way, and must not go, too.
    seat.core.store(-1, std::memory_order_relaxed);
    leave_cores([&](auto&& take_out) {
        take_out(current_core());
        for (int index = 0; index < num_seats_; index++) {
            const int core = seats_[index].core.load(std::memory_order_relaxed);
            if (core >= 0) take_out(core);
        }
    });
    seat.core.store(current_core(), std::memory_order_relaxed);
}

}  // namespace pf
