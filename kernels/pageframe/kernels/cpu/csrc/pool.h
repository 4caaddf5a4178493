// Threads that walk through a step together, phase by phase.
//
// `run` lends the caller's thread and wakes the others; each walks through the same `body`. Inside,
// `parallel_for(num_tasks, fn)` is a phase: tasks are claimed one at a time, and a phase is over when
// its tasks are done. Nobody waits for a *thread*: one that lost its core between two tasks holds no
// one up; it finds its phases over and catches up. One that holds a task does, hence small tasks.
//
//     ticket   | phase 7 | next task 3 |      claimed by compare-and-swap
//     num_done |       2 |                    whoever makes it num_tasks opens phase 8
//
// What a body must keep to:
// - Everything it writes to shared memory it writes inside tasks. Between phases it only computes
//   what the next phase is, from what `run` was given: never from what a task wrote, because a late
//   thread would read it after a later phase has changed it.
// - All threads make the same calls of parallel_for, with the same num_tasks.
// - What a phase wrote is seen by every later phase.
//
// Waiting spins for about 50 us, then sleeps on a futex. Whoever spins offers its core again and
// again: a process that waits for a core takes this one, and not that of a thread that holds a task.
// Threads keep off each other's cores (seats.h).
// After a fork the child's pool has no threads but the caller's, and works.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "futex.h"
#include "seats.h"

namespace pf {

class Pool;

// One thread's walk through a run.
class Worker {
public:
    Worker(Pool* pool, int index, uint32_t phase) : pool_(pool), index_(index), phase_(phase) {}

    // In [0, num_threads): no two threads of a run share it, so it may pick scratch memory.
    int index() const { return index_; }
    int num_threads() const;

    // Calls fn(task) for each task in [0, num_tasks), num_tasks < 2^32, each once, on some thread;
    // returns when all are done (not only this thread's).
    template <class Fn>
    void parallel_for(int64_t num_tasks, Fn&& fn);

private:
    Pool* pool_;
    int index_;
    uint32_t phase_;
};

class Pool {
public:
    // `num_threads` >= 1, the caller of `run` included. Threads that the system refuses are done
    // without: num_threads() tells how many there are.
    explicit Pool(int num_threads);
    ~Pool();  // waits for the threads to end; never from inside a run
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Calls body(Worker&) on every thread that is awake in time, the caller's among them; returns
    // when all of them have left it. One run at a time: another caller waits.
    template <class Body>
    void run(Body&& body) {
        run_erased([](void* erased, Worker& worker) { (*static_cast<Body*>(erased))(worker); }, &body);
    }

private:
    friend class Worker;
    using Call = void (*)(void* body, Worker& worker);

    struct Thread;
    static void* thread_main(void* thread);
    void serve(int index);
    void run_erased(Call call, void* body);
    bool enter();
    void leave();
    void close_gate();
    bool claim(uint32_t phase, int64_t num_tasks, int64_t* task);
    void finish(uint32_t phase, int64_t num_tasks);

    int num_threads_ = 1;
    int owner_pid_;
    std::unique_ptr<Thread[]> threads_;
    std::unique_ptr<Seats> seats_;
    std::mutex run_lock_;

    // The run that is on. Read by threads that are through the gate, hence never while it changes.
    Call call_ = nullptr;
    void* body_ = nullptr;
    uint32_t first_phase_ = 0;
    std::atomic<bool> stop_{false};
    alignas(64) Signal epoch_;  // one up for each run: what threads without work wait on
    alignas(64) Signal gate_;   // bit 31: threads may enter; below it: how many are inside

    // The phase that is on.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> num_done_{0};
    alignas(64) Signal phase_;
};

inline int Worker::num_threads() const { return pool_->num_threads(); }

template <class Fn>
void Worker::parallel_for(int64_t num_tasks, Fn&& fn) {
    if (num_tasks <= 0) return;
    if (pool_->num_threads() == 1) {
        for (int64_t task = 0; task < num_tasks; task++) fn(task);
        return;
    }
    pool_->seats_->take(index_, phase_);
    int64_t task;
    while (pool_->claim(phase_, num_tasks, &task)) {
        fn(task);
        pool_->finish(phase_, num_tasks);
    }
    pool_->phase_.wait_while(phase_, [this] { pool_->seats_->leave(index_); });
    phase_++;
}

}  // namespace pf
