// Paged attention without its arithmetic: the tasks of rows and pages, their workers, and the memory of partial results.
//
// The result of a row is a function of its visible keys in path order only: 32 in a page, GROUP pages in a group, pages one after
// another within a group, groups merged from left to right, after a sink logit if there is one. The choice of which rows are read
// together therefore changes no bit.
#pragma once
#include "kernels.h"

#include <atomic>
#include <vector>

namespace redraft {

struct AttendRow {
    int32_t seq, row;  // row of the sequence
    int32_t partial;   // where the result of its group 0 is stored, its other groups after it; -1: none
};

// Rows with the same pages: a block of rows of one sequence, or rows of several sequences that list the same pages for this group.
struct AttendTask {
    int32_t first, rows;  // indices into the rows of the plan
    int32_t group;        // the one group to attend, with a partial result; -1: all groups, with the final result
};

struct AttendShape {
    int64_t size, padded;    // of a head; in floats, rounded up to two whole registers of any width
    int64_t share, queries;  // query heads of a kv head; the largest number of queries of a task
    int64_t tail;            // the largest number of slots in the pages with tentative nodes of a sequence
    int64_t turned;          // 1 if a sequence has a window, with rotated queries for the keys before it, else 0
};

// Results of queries: the largest score in powers of two, sums of weights as multiplied and before they were rounded for that, and mixes
// [padded]. Reading any of the arrays may go on for a register beyond its end.
struct Mixed {
    float *most, *rounded, *exact, *mix;

    INLINE Mixed from(int64_t query, int64_t padded) const { return {most + query, rounded + query, exact + query, mix + query * padded}; }
};

struct Partials {
    Mixed groups;  // [partial][query heads]
    struct End {
        float most, sum;
    }* ends;       // [rows][query heads]: of the final results, or null
};

// The part of attention that depends on the instruction set; defined by attend_impl.h.
struct AttendKernels {
    int64_t (*scratch)(const AttendShape&);  // floats that a worker needs
    // rows: those of the task. then: the pages, GROUP or null ones, that the worker reads next
    void (*task)(const AttendJob&, const AttendShape&, const AttendRow* rows, const AttendTask&, int64_t kv_head,
                 const uint8_t* const* then, const Partials&, float* scratch);
    // Merges the groups of a row from left to right into the final result: those of each lane, up to its end.
    void (*merge)(const AttendJob&, const AttendShape&, const AttendRow&, const Partials&, float* scratch);
    // Converts a vector of numbers to codes and their scale.
    void (*encode)(const uint8_t* from, Kind, int64_t size, int8_t* codes, float* scale);
    // Adds the statistics of the slots of a group, after all rows are done.
    void (*watch)(const AttendJob&, const AttendShape&, const Watched&, int64_t kv_head, int64_t group, const Partials&, float* scratch);
};

struct AttendChoices {  // none of them changes a result
    int32_t workers = 1;
    int32_t few = 16;       // sequences with at most this many rows are split by groups
    int32_t block = 192;    // queries of a task
    int32_t shared = 1;     // pages that sequences share are read once
};

// The work of the workers in every layer of a step. Sequences are referred to by index.
struct AttendPlan {
    AttendShape shape;
    std::vector<AttendRow> rows;
    std::vector<AttendTask> tasks;    // the longest first
    std::vector<AttendRow> waiting;   // rows with groups to merge at the end
    int64_t partials = 0;
    int64_t ends = 0;                 // rows of the batch if something is watched, else 0
};

AttendPlan plan_attention(const Seq* seqs, int64_t count, const Pool& pool, int64_t heads, const AttendChoices& choices);

// Memory that outlives a step; it only grows. No thread may be in attend() while it grows.
class Attention {
public:
    Attention() = default;
    Attention(const Attention&) = delete;
    Attention& operator=(const Attention&) = delete;
    ~Attention();
    void prepare(const AttendKernels&, const AttendPlan&, int64_t heads, int workers);

private:
    friend void attend(const AttendKernels&, const AttendJob&, const AttendPlan&, Attention&, int worker, int workers);
    float* memory_ = nullptr;
    int64_t room_ = 0, per_worker_ = 0;
    Partials partials_{};
    std::atomic<int64_t> next_{0};
    std::atomic<int32_t> left_{0};
};

// Called by all workers of a job after all of them wrote the keys and values of this step. The output is complete, and the next call
// may begin, when all calls have returned: put a barrier after it.
void attend(const AttendKernels&, const AttendJob&, const AttendPlan&, Attention&, int worker, int workers);

}  // namespace redraft
