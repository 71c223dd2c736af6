#include "threads.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

#ifdef __linux__
#include <climits>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace redraft {
namespace {

// How long a thread polls before it sleeps. Between jobs: more than the time between two steps. Within a job: much longer than it
// takes to wake a thread (0.1 ms and more on an idle processor of a virtual machine), or one that slept makes the others sleep at the
// next barrier, and so on: a step of 330 barriers took 40 ms instead of 10.
constexpr std::chrono::microseconds BETWEEN{1500}, WITHIN{3000};

inline void pause_once() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A number to wait for: first by polling, then asleep in the kernel. Only sleeping threads are woken.
struct Gate {
    std::atomic<uint32_t> at{0};
    std::atomic<int> asleep{0};

    void open() {
        at.fetch_add(1);  // in one order with `asleep`: a thread that goes to sleep after it sees the new number
        if (asleep.load()) wake();
    }

    bool wait(uint32_t old, std::chrono::microseconds polls) {  // whether the thread slept
        const auto until = std::chrono::steady_clock::now() + polls;
        do {
            for (int i = 0; i < 32; i++) {
                if (at.load(std::memory_order_acquire) != old) return false;
                pause_once();
            }
        } while (std::chrono::steady_clock::now() < until);
        asleep.fetch_add(1);
        while (at.load() == old) sleep(old);
        asleep.fetch_sub(1);
        return true;
    }

private:
#ifdef __linux__
    void sleep(uint32_t old) { syscall(SYS_futex, reinterpret_cast<uint32_t*>(&at), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, reinterpret_cast<uint32_t*>(&at), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
    void sleep(uint32_t) { std::this_thread::yield(); }
    void wake() {}
#endif
};

// The processors that the workers of a job run on. The kernel may wake a worker on the processor of another and leave it there, because
// both sleep often; every job then takes twice as long. Such a worker moves to a processor that no other uses; afterwards the kernel is
// free again.
struct Places {
    std::array<std::atomic<int>, 256> at;

    Places() {
        for (auto& one : at) one.store(-1, std::memory_order_relaxed);  // unknown
    }

#ifdef __linux__
    void here(int worker) {
        if (worker < int(at.size())) at[worker].store(sched_getcpu(), std::memory_order_relaxed);
    }

    void leave_others(int worker, int workers) {
        here(worker);
        const int own = sched_getcpu(), known = std::min(workers, int(at.size()));
        bool taken = false;
        for (int i = 0; i < known; i++) taken |= i != worker && at[i].load(std::memory_order_relaxed) == own;
        cpu_set_t allowed, free;
        if (!taken || sched_getaffinity(0, sizeof allowed, &allowed)) return;
        free = allowed;
        for (int i = 0; i < known; i++) {
            const int used = at[i].load(std::memory_order_relaxed);
            if (used >= 0 && used < CPU_SETSIZE) CPU_CLR(used, &free);
        }
        if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof free, &free)) return;
        sched_setaffinity(0, sizeof allowed, &allowed);
        here(worker);
    }
#else
    void here(int) {}
    void leave_others(int, int) {}
#endif
};

thread_local int self = 0;  // the worker that this thread is

struct Workers {
    std::vector<std::thread> threads;
    Places places;
    Gate start, finished, crossed;  // a new job or the end; jobs that all workers finished; barriers
    std::atomic<int> left{0};        // workers still in the job
    std::atomic<int> arrived{0};     // at the barrier
    const std::function<void(int, int)>* job = nullptr;
    bool ending = false;
    int count = 1, active = 1;  // active: workers of this job, all of them or the caller alone

    void work(int worker, uint32_t seen) {
        self = worker;
        for (;;) {
            start.wait(seen++, BETWEEN);
            if (ending) return;
            places.leave_others(worker, count);
            (*job)(worker, count);
            if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) finished.open();
        }
    }

    void resize(int wanted) {
        if (count > 1) {
            ending = true;
            start.open();
            for (auto& thread : threads) thread.join();
            threads.clear();
            ending = false;
        }
        count = 1;
        const uint32_t seen = start.at.load();
        for (int i = 1; i < wanted; i++) {  // if a thread cannot be started, the earlier ones stay
            threads.emplace_back(&Workers::work, this, i, seen);
            count = i + 1;
        }
    }

    void run(const std::function<void(int, int)>& one, bool by_all) {
        active = by_all ? count : 1;
        if (active == 1) {
            one(0, 1);
            return;
        }
        job = &one;
        places.here(0);  // the others move, which sleep more
        left.store(count, std::memory_order_relaxed);
        const uint32_t done = finished.at.load(std::memory_order_relaxed);
        start.open();
        one(0, count);
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) finished.open();
        else finished.wait(done, WITHIN);
    }

    void barrier() {
        if (active == 1) return;
        const uint32_t now = crossed.at.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived.store(0, std::memory_order_relaxed);
            crossed.open();
        } else {
            if (crossed.wait(now, WITHIN)) places.leave_others(self, count);
        }
    }
};

std::recursive_mutex entrance;  // one job at a time, from any thread
Workers* pool = nullptr;  // never destroyed: workers may sleep in it when the process ends

Workers& workers() {
    if (!pool) {
        pool = new Workers();
        // a forked child has no workers: it uses its own thread until more are requested
        pthread_atfork([] { entrance.lock(); }, [] { entrance.unlock(); }, [] {
            pool = new Workers();
            new (&entrance) std::recursive_mutex();
        });
    }
    return *pool;
}

}  // namespace

Alone::Alone() { entrance.lock(); }
Alone::~Alone() { entrance.unlock(); }

int threads() {
    const Alone alone;
    return workers().count;
}

void set_threads(int count) {
    const Alone alone;
    if (count != workers().count) workers().resize(count);
}

void barrier() { pool->barrier(); }

void run(const std::function<void(int, int)>& job) {
    const Alone alone;
    workers().run(job, true);
}

bool Pace::alone() {
    if (calls_ < 4) return calls_++ % 2;  // each way twice
    const bool better = took_[1] < took_[0];
    if (better != better_) better_ = better, left_ = std::min(left_, SOON);
    if (left_-- > 0) return better;
    left_ = std::clamp(int64_t(TRY * (took_[!better] / took_[better] - 1)), SOON, LATE);
    return !better;
}

void Pace::note(bool alone, double seconds) {
    double& took = took_[alone];
    if (took == 0 || seconds < took || (calls_ == 4 && alone != better_)) took = seconds;
    else took += 0.25 * (std::min(seconds, 2 * took) - took);  // one disturbed call says little
}

void run(const std::function<void(int, int)>& job, Pace& pace) {
    const Alone held;
    if (workers().count == 1) return run(job);
    const bool alone = pace.alone();
    const auto began = std::chrono::steady_clock::now();
    workers().run(job, !alone);
    pace.note(alone, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
}

}  // namespace redraft
