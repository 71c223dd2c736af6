// One pool of workers for the whole process; the calling thread is worker 0.
#pragma once
#include <cstdint>
#include <functional>

namespace redraft {

// While a thread holds one, no other thread runs a job or changes the workers or the shared buffers. The holder may run jobs.
struct Alone {
    Alone();
    ~Alone();
    Alone(const Alone&) = delete;
};

int threads();                // the number of workers, with the caller
void set_threads(int count);  // between jobs only
void barrier();               // inside a job: returns when all workers have arrived
void run(const std::function<void(int worker, int workers)>& job);

// Chooses whether a repeated job runs on all workers or on the caller alone. The caller alone is faster for small jobs, and when other
// processes use the processors so that every barrier waits. The other way is tried soon after a change, and then so rarely that what the
// tries cost stays below a percent. Results do not depend on it.
class Pace {
public:
    bool alone();
    void note(bool alone, double seconds);

private:
    static constexpr int64_t TRY = 128, SOON = 8, LATE = 1024;  // calls until the other way is tried: by its extra time, at least, at most
    double took_[2] = {0, 0};  // seconds on all workers, and alone: of the better way the best, moved towards later times; else the last
    int64_t calls_ = 0, left_ = SOON;
    bool better_ = false;  // alone
};
void run(const std::function<void(int worker, int workers)>& job, Pace& pace);

// The contiguous share of a worker of n items: [first, last).
struct Share {
    int64_t first, last;
    Share(int64_t from, int64_t to) : first(from), last(to) {}
    Share(int64_t n, int worker, int workers) : first(n * worker / workers), last(n * (worker + 1) / workers) {}
};

}  // namespace redraft
