#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <new>

namespace pf {

namespace {

constexpr uint32_t kOpen = 1u << 31;
constexpr int kNumThreadsMax = 1024;

// Signals are for the threads of the program that loaded us.
class SignalsBlocked {
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};

}  // namespace

struct Pool::Thread {
    Pool* pool;
    int index;
    pthread_t handle;
};

Pool::Pool(int num_threads) : owner_pid_(getpid()) {
    if (num_threads > kNumThreadsMax) num_threads = kNumThreadsMax;
    if (num_threads <= 1) return;
    threads_.reset(new (std::nothrow) Thread[num_threads]);
    if (!threads_) return;
    seats_ = std::make_unique<Seats>(num_threads);
    const SignalsBlocked blocked;
    // Threads already started take their own index, never num_threads_, so it may still grow.
    for (int index = 1; index < num_threads; index++) {
        Thread& thread = threads_[index];
        thread.pool = this;
        thread.index = index;
        if (pthread_create(&thread.handle, nullptr, &Pool::thread_main, &thread) != 0) break;
        num_threads_++;
    }
}

Pool::~Pool() {
    // A forked child has the handles of threads that it does not have.
    if (getpid() != owner_pid_) return;
    stop_.store(true, std::memory_order_release);
    epoch_.set(epoch_.load() + 1);
    for (int index = 1; index < num_threads_; index++) pthread_join(threads_[index].handle, nullptr);
}

void* Pool::thread_main(void* thread) {
    auto* self = static_cast<Thread*>(thread);
    self->pool->serve(self->index);
    return nullptr;
}

void Pool::serve(int index) {
    uint32_t seen = 0;
    while (true) {
        seen = epoch_.wait_while(seen);
        if (stop_.load(std::memory_order_acquire)) return;
        // Too late for this run: it ended without us.
        if (!enter()) continue;
        Worker worker(this, index, first_phase_);
        call_(body_, worker);
        seats_->leave(index);
        leave();
    }
}

void Pool::run_erased(Call call, void* body) {
    const std::lock_guard<std::mutex> lock(run_lock_);
    // Threads that were inside when this process was forked off will never leave.
    if (getpid() != owner_pid_) {
        gate_.set(0);
        for (int index = 1; index < num_threads_; index++) seats_->leave(index);
    }
    call_ = call;
    body_ = body;
    first_phase_ = phase_.load();
    if (num_threads_ > 1) {
        gate_.set(kOpen);
        epoch_.set(epoch_.load() + 1);
    }
    Worker worker(this, 0, first_phase_);
    call(body, worker);
    if (seats_) seats_->leave(0);
    close_gate();
}

bool Pool::enter() {
    while (true) {
        const uint32_t gate = gate_.load();
        if (!(gate & kOpen)) return false;
        if (gate_.swap(gate, gate + 1)) return true;
    }
}

void Pool::leave() {
    while (true) {
        const uint32_t gate = gate_.load();
        if (gate_.swap(gate, gate - 1)) return;
    }
}

// Lets nobody in any more and waits until all are out.
void Pool::close_gate() {
    uint32_t gate = gate_.load();
    while (!gate_.swap(gate, gate & ~kOpen)) gate = gate_.load();
    gate &= ~kOpen;
    while (gate != 0) gate = gate_.wait_while(gate);
}

bool Pool::claim(uint32_t phase, int64_t num_tasks, int64_t* task) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (true) {
        const int64_t next = static_cast<int64_t>(ticket & 0xffffffffu);
        if (static_cast<uint32_t>(ticket >> 32) != phase || next >= num_tasks) return false;
        if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire)) {
            *task = next;
            return true;
        }
    }
}

// Counts one task as done; the last one opens the next phase.
void Pool::finish(uint32_t phase, int64_t num_tasks) {
    if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 != num_tasks) return;
    num_done_.store(0, std::memory_order_relaxed);
    ticket_.store(static_cast<uint64_t>(phase + 1) << 32, std::memory_order_release);
    phase_.set(phase + 1);
}

}  // namespace pf
