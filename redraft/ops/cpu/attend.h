// Paged attention, apart from its arithmetic: which rows meet which pages, who does it, and where results of groups wait.
//
// A row's result is a function of its visible keys in path order alone: 32 a page, GROUP pages a group, pages one after another
// within a group, groups merged from left to right. What is decided here (who reads what together) therefore changes no bit.
#pragma once
#include "kernels.h"

#include <atomic>
#include <vector>

namespace redraft {

struct AttendRow {
    int32_t seq, row;  // row of the sequence
    int32_t partial;   // where the result of its group 0 waits, its other groups behind it; -1: none waits
};

// Rows that meet the same pages: a block of one sequence's, or rows of several sequences that list the same pages for this group.
struct AttendTask {
    int32_t first, rows;  // of the plan's rows
    int32_t group;        // the one group attended, whose result waits; -1: all of them, and the end result is written
};

struct AttendShape {
    int64_t size, padded;    // of a head; in floats, up to two whole registers of any width
    int64_t share, queries;  // query heads of a kv head; the most queries of a task
    int64_t tail;            // the most slots of the pages that hold tentative nodes of a sequence
    int64_t turned;          // 1 where a sequence has a window, before which queries are turned, else 0
};

// Sums of weights: as they are multiplied, and before they were rounded for that; these are added up where something is watched only.
struct Sums {
    float rounded, exact;
};

// Results of groups, [partial][query heads]: largest score, sums, mix [padded]. ends, [rows][query heads]: of all groups, or null.
struct Partials {
    float* most;
    Sums* sum;
    float* mix;
    struct End {
        float most, sum;
    }* ends;
};

// What attention needs of an instruction set; defined by attend_impl.h.
struct AttendKernels {
    int64_t (*scratch)(const AttendShape&);  // floats that a worker needs
    // rows: the task's. then: the page that the worker reads next, or null
    void (*task)(const AttendJob&, const AttendShape&, const AttendRow* rows, const AttendTask&, int64_t kv_head, const uint8_t* then, const Partials&,
                 float* scratch);
    // The groups of a row from left to right, and the end result.
    void (*merge)(const AttendJob&, const AttendShape&, const AttendRow&, int64_t groups, int64_t head, const Partials&, float* scratch);
    // A vector of numbers to its codes and their scale.
    void (*encode)(const uint8_t* from, Kind, int64_t size, int8_t* codes, float* scale);
    // What is watched of a group's slots, once all rows are done.
    void (*watch)(const AttendJob&, const AttendShape&, const Watched&, int64_t kv_head, int64_t group, const Partials&, float* scratch);
};

struct AttendChoices {  // none of them changes a result
    int32_t workers = 1;
    int32_t few = 16;       // sequences of at most so many rows are split by groups
    int32_t block = 256;    // queries of a task
    int32_t shared = 1;     // pages that sequences have in common are read once
};

// What the workers do in every layer of a step. Sequences are referred to by their index.
struct AttendPlan {
    AttendShape shape;
    std::vector<AttendRow> rows;
    std::vector<AttendTask> tasks;    // the longest first
    std::vector<AttendRow> waiting;   // rows whose groups are merged at the end
    std::vector<int32_t> groups;      // of each of them
    int64_t partials = 0;
    int64_t ends = 0;                 // rows of the batch, where something is watched
};

AttendPlan plan_attention(const Seq* seqs, int64_t count, const Pool& pool, int64_t heads, const AttendChoices& choices);

// Memory that outlives a step; it only grows. Nobody may be in attend() while it does.
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

// Called by all workers of a job, after this step's keys and values were written by all of them. The output is whole, and the next
// call may begin, when all have returned: put a barrier behind it.
void attend(const AttendKernels&, const AttendJob&, const AttendPlan&, Attention&, int worker, int workers);

}  // namespace redraft
