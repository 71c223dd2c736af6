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

// The worker's contiguous share of n things: [first, last).
struct Share {
    int64_t first, last;
    Share(int64_t n, int worker, int workers) : first(n * worker / workers), last(n * (worker + 1) / workers) {}
};

}  // namespace redraft
