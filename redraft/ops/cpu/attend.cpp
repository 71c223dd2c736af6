#include "attend.h"

#include "threads.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace redraft {
namespace {

constexpr int64_t SPAN = PAGE * GROUP;  // path indices of a group
constexpr int64_t MOST_WAITING = 64 << 20;  // bytes of partial results; more rows than fit are not split
constexpr int64_t EACH = 4;             // items that each worker should get at least, so that no worker waits long for the last one
constexpr int64_t FEWEST = 4;           // rows of an item, if a sequence has so many: fewer would read keys more often than they save

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t lanes_of(const Seq& s, const Pool& pool) {
    return s.lanes == 0 ? 1 : s.lanes == 1 ? pool.layers : int64_t(pool.layers) * pool.kv_heads;
}

class Planner {
public:
    Planner(const Seq* seqs, int64_t count, const Pool& pool, int64_t heads, const AttendChoices& choices)
        : seqs_(seqs), pool_(pool), choices_(choices) {
        if (pool.size % 2 || heads % pool.kv_heads) throw std::invalid_argument("attention: odd head size, or heads do not divide");
        if (pool.kind != F32 && pool.kind != BF16 && pool.kind != I8) throw std::invalid_argument("attention: pages of this kind are not supported");
        AttendShape& shape = plan_.shape;
        shape.size = pool.size;
        shape.padded = ceil_div(pool.size, 32) * 32;
        shape.share = heads / pool.kv_heads;
        most_rows_ = std::max<int64_t>(1, std::min<int64_t>(choices.block, 256) / shape.share);
        shape.queries = most_rows_ * shape.share;
        shape.tail = shape.turned = 0;
        for (int64_t i = 0; i < count; i++) measure(i);
    }

    AttendPlan made() {
        int64_t whole = 0;
        for (size_t i = 0; i < groups_.size(); i++) {
            if (!seqs_[i].rows) continue;
            if (splits(i)) split_.push_back(int32_t(i));
            else sweep(i);
            whole = std::max(whole, full_[i]);
        }
        for (int32_t i : split_) await(i);
        for (int64_t group = 0; !split_.empty() && group < most_groups_; group++) cluster(group, group < whole);
        order();
        return std::move(plan_);
    }

private:
    void measure(int64_t i) {
        const Seq& s = seqs_[i];
        const int32_t* end = s.lengths + lanes_of(s, pool_);
        keys_.push_back(s.held(*std::max_element(s.lengths, end)));
        groups_.push_back(ceil_div(keys_.back(), SPAN));
        full_.push_back(s.lanes == 0 && choices_.shared ? s.lengths[0] / SPAN : 0);
        most_groups_ = std::max(most_groups_, groups_.back());
        if (s.recent && s.turned) plan_.shape.turned = 1;
        const int64_t nodes = s.tail + s.rows - s.chain;
        if (s.rows > s.chain_rows) plan_.shape.tail = std::max(plan_.shape.tail, ceil_div(PAGE - 1 + nodes, PAGE) * PAGE);
    }

    // With few rows, or fewer blocks than keep the workers busy, groups go to different workers.
    bool splits(size_t i) {
        if (groups_[i] == 1) return false;
        if (seqs_[i].rows > choices_.few && ceil_div(seqs_[i].rows, 16) * pool_.kv_heads >= EACH * choices_.workers) return false;
        const int64_t waiting = int64_t(seqs_[i].rows) * groups_[i] * plan_.shape.padded * plan_.shape.share * pool_.kv_heads * 4;
        if (waiting_ + waiting > MOST_WAITING) return false;
        waiting_ += waiting;
        return true;
    }

    void sweep(size_t i) {
        int64_t block = most_rows_;
        while (block > FEWEST && ceil_div(seqs_[i].rows, block) * pool_.kv_heads < EACH * choices_.workers) block /= 2;
        for (int64_t row = 0; row < seqs_[i].rows; row += block) {
            const int64_t end = std::min<int64_t>(row + block, seqs_[i].rows), first = int64_t(plan_.rows.size());
            for (int64_t r = row; r < end; r++) plan_.rows.push_back({int32_t(i), int32_t(r), -1});
            const int64_t keys = keys_[i] - seqs_[i].rows + end;  // the first rows of a chain see fewer
            add(first, end - row, -1, (end - row) * keys);
        }
    }

    void await(int32_t i) {
        first_partial_.resize(groups_.size());
        first_partial_[i] = plan_.partials;
        for (int32_t r = 0; r < seqs_[i].rows; r++) {
            plan_.waiting.push_back({i, r, int32_t(plan_.partials)});
            plan_.partials += groups_[i];
        }
    }

    const int32_t* pages(int32_t i, int64_t group) const { return seqs_[i].pages + group * GROUP; }

    // Tasks of one group: sequences that list the same full pages for it form one task.
    void cluster(int64_t group, bool any_full) {
        std::vector<int32_t> together;
        for (int32_t i : split_) {
            if (group >= groups_[i]) continue;
            if (any_full && group < full_[i]) together.push_back(i);
            else tasks_of({i}, group);
        }
        const auto compare = [&](int32_t a, int32_t b) { return std::memcmp(pages(a, group), pages(b, group), GROUP * sizeof(int32_t)); };
        std::stable_sort(together.begin(), together.end(), [&](int32_t a, int32_t b) { return compare(a, b) < 0; });
        for (size_t from = 0, to; from < together.size(); from = to) {
            for (to = from + 1; to < together.size() && !compare(together[from], together[to]);) to++;
            tasks_of({together.begin() + from, together.begin() + to}, group);
        }
    }

    void tasks_of(const std::vector<int32_t>& members, int64_t group) {
        const int64_t first = int64_t(plan_.rows.size());
        int64_t keys = 0;
        for (int32_t i : members) {
            const Seq& s = seqs_[i];
            keys = std::max(keys, std::min(SPAN, keys_[i] - group * SPAN));
            for (int32_t r = 0; r < s.rows; r++) plan_.rows.push_back({i, r, int32_t(first_partial_[i] + r * groups_[i])});
        }
        const int64_t end = int64_t(plan_.rows.size());
        for (int64_t at = first; at < end; at += most_rows_) {
            const int64_t rows = std::min(most_rows_, end - at);
            add(at, rows, group, std::max<int64_t>(rows, 4) * keys);  // with few rows, memory sets the time, not arithmetic
        }
    }

    void add(int64_t first, int64_t rows, int64_t group, int64_t cost) {
        plan_.tasks.push_back({int32_t(first), int32_t(rows), int32_t(group)});
        costs_.push_back(cost);
    }

    void order() {
        std::vector<int32_t> places(plan_.tasks.size());
        for (size_t i = 0; i < places.size(); i++) places[i] = int32_t(i);
        std::stable_sort(places.begin(), places.end(), [&](int32_t a, int32_t b) { return costs_[a] > costs_[b]; });
        std::vector<AttendTask> sorted;
        for (int32_t place : places) sorted.push_back(plan_.tasks[place]);
        plan_.tasks = std::move(sorted);
    }

    const Seq* seqs_;
    const Pool& pool_;
    AttendChoices choices_;
    AttendPlan plan_;
    int64_t most_rows_ = 1, most_groups_ = 0, waiting_ = 0;
    std::vector<int64_t> keys_, groups_, full_, first_partial_;  // of sequences: slots of the longest lane, groups, whole groups to share
    std::vector<int64_t> costs_;                                // of tasks
    std::vector<int32_t> split_;
};

}  // namespace

AttendPlan plan_attention(const Seq* seqs, int64_t count, const Pool& pool, int64_t heads, const AttendChoices& choices) {
    return Planner(seqs, count, pool, heads, choices).made();
}

Attention::~Attention() { std::free(memory_); }

void Attention::prepare(const AttendKernels& kernels, const AttendPlan& plan, int64_t heads, int workers) {
    const int64_t results = plan.partials * heads, line = LINE / int64_t(sizeof(float));
    const int64_t numbers = ceil_div(results, line) * line;
    per_worker_ = ceil_div(kernels.scratch(plan.shape), line) * line;
    const int64_t mixes = results * plan.shape.padded;
    const int64_t wanted = per_worker_ * workers + 3 * numbers + mixes + 2 * plan.ends * heads;
    if (wanted > room_) {
        std::free(memory_);
        room_ = 0;
        memory_ = static_cast<float*>(std::aligned_alloc(size_t(LINE), size_t(ceil_div(wanted, line) * LINE)));
        if (!memory_) throw std::bad_alloc();
        room_ = wanted;
    }
    float* at = memory_ + per_worker_ * workers;
    partials_.groups = {at, at + numbers, at + 2 * numbers, at + 3 * numbers};
    partials_.ends = plan.ends ? reinterpret_cast<Partials::End*>(at + 3 * numbers + mixes) : nullptr;
}

namespace {
// Slots of a lane, with tentative ones.
int64_t slots_of(const AttendJob& job, const Seq& seq, int64_t kv_head) {
    return seq.held(length_of(seq, job.pool, job.layer, kv_head));
}

// Whether the lane of this kv head ends before the task's group. The sequences of a task with several have SHARED lanes, with full pages.
bool beyond(const AttendJob& job, const AttendPlan& plan, const AttendTask& task, int64_t kv_head) {
    return task.group > 0 && task.group * SPAN >= slots_of(job, job.seqs[plan.rows[task.first].seq], kv_head);
}

// The pages of a task's group, and null beyond them.
void pages_of(const AttendJob& job, const AttendPlan& plan, const AttendTask& task, int64_t kv_head, const uint8_t** pages) {
    const Seq& seq = job.seqs[plan.rows[task.first].seq];
    const int64_t first = std::max(task.group, 0) * GROUP, slots = slots_of(job, seq, kv_head);
    for (int64_t i = 0; i < GROUP; i++)
        pages[i] = (first + i) * PAGE < slots ? find_unit(seq, job.pool, job.encoded, job.layer, kv_head, first + i).at : nullptr;
}
}  // namespace

void attend(const AttendKernels& kernels, const AttendJob& job, const AttendPlan& plan, Attention& memory, int worker, int workers) {
    float* scratch = memory.memory_ + worker * memory.per_worker_;
    const int64_t kv_heads = job.pool.kv_heads, items = int64_t(plan.tasks.size()) * kv_heads;
    const auto claim = [&] {
        int64_t item = memory.next_.fetch_add(1, std::memory_order_relaxed);
        while (item < items && beyond(job, plan, plan.tasks[item / kv_heads], item % kv_heads))
            item = memory.next_.fetch_add(1, std::memory_order_relaxed);
        return item;
    };
    for (int64_t item = claim(), next; item < items; item = next) {
        const AttendTask& task = plan.tasks[item / kv_heads];
        const bool brief = task.group >= 0;  // claim early, to prefetch; not in a long task, as others could take it
        next = brief ? claim() : -1;
        const uint8_t* then[GROUP] = {};
        if (next >= 0 && next < items) pages_of(job, plan, plan.tasks[next / kv_heads], next % kv_heads, then);
        kernels.task(job, plan.shape, plan.rows.data() + task.first, task, item % kv_heads, then, memory.partials_, scratch);
        if (!brief) next = claim();
    }
    if (memory.left_.fetch_add(1, std::memory_order_acq_rel) == workers - 1) {  // all workers have reached the end
        memory.next_.store(0, std::memory_order_relaxed);
        memory.left_.store(0, std::memory_order_relaxed);
    }
    if (!plan.waiting.empty()) barrier();
    const Share share(int64_t(plan.waiting.size()), worker, workers);
    for (int64_t i = share.first; i < share.last; i++) kernels.merge(job, plan.shape, plan.waiting[i], memory.partials_, scratch);
    if (!job.watches) return;
    barrier();
    for (int64_t i = 0; i < job.watches; i++) {
        const int64_t groups = ceil_div(job.watched[i].slots, SPAN);
        const Share own(groups * kv_heads, worker, workers);
        for (int64_t item = own.first; item < own.last; item++)
            kernels.watch(job, plan.shape, job.watched[i], item / groups, item % groups, memory.partials_, scratch);
    }
}

}  // namespace redraft
