// One pool of workers for the process: the calling thread is worker 0.
#pragma once
#include <cstdint>
#include <functional>

namespace redraft {

// While one is held, no other thread runs a job, changes the workers or the buffers that jobs share. The holder may run jobs.
struct Alone {
    Alone();
    ~Alone();
    Alone(const Alone&) = delete;
};

int threads();                // workers, with the caller
void set_threads(int count);  // between jobs only
void barrier();               // inside a job: returns when all workers have come here
void run(const std::function<void(int worker, int workers)>& job);

// Whether a job that comes again and again is done sooner by all workers or by the caller alone, as where other processes hold the
// processors and every barrier waits for them, or where a job is small. Tried again once in 64 times. No result hangs on it.
class Pace {
public:
    bool alone();
    void note(bool alone, double seconds);

private:
    double took_[2] = {0, 0};  // seconds by all, alone: the last best, drawn towards later ones
    int64_t calls_ = 0;
};
void run(const std::function<void(int worker, int workers)>& job, Pace& pace);

// The worker's contiguous share of n things: [first, last).
struct Share {
    int64_t first, last;
    Share(int64_t n, int worker, int workers) : first(n * worker / workers), last(n * (worker + 1) / workers) {}
};

}  // namespace redraft
