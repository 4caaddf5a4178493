// The threads of a pool, played by one that takes their seats one after the other.
#include <sched.h>

#include "seats.h"

namespace {

constexpr int kNumTries = 100;

}  // namespace

// Two threads begin a phase on one core; where the second is then. -1 if the system has moved them
// in between, time and again.
extern "C" __attribute__((visibility("default"))) int second_of_two_on_a_core(int* shared_core) {
    for (int i = 0; i < kNumTries; i++) {
        pf::Seats seats(2);
        *shared_core = sched_getcpu();
        seats.take(1, 8);
        if (sched_getcpu() != *shared_core) continue;
        seats.take(0, 8);
        return sched_getcpu();
    }
    return -1;
}

// The same, but the first one sleeps.
extern "C" __attribute__((visibility("default"))) int second_beside_one_asleep(int* shared_core) {
    pf::Seats seats(2);
    *shared_core = sched_getcpu();
    seats.take(1, 8);
    seats.leave(1);
    seats.take(0, 8);
    return sched_getcpu();
}
