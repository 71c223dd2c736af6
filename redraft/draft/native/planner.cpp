// The compiled form of planner.py, acceptance.py and payoff.py in redraft/draft, which say what they do. Both forms choose the same
// nodes: sums are taken in the same order.
#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <queue>

#include "source.h"

namespace redraft::draft {
namespace {

constexpr int MOST_PARTS = 8;
constexpr double MARGIN = 0.02, LIKELIEST = 0.9, FALL = 0.85;  // planner.py
constexpr int AHEAD = 48, FIXED_NODES = 4;
constexpr double MOOD_RATE = 0.1, LARGEST_MOOD = 3.0;
constexpr int DEPTHS = 8, MOST = 1000;  // acceptance.py
constexpr double SURE = 0.01;
constexpr double PATIENCE = 0.5, LEAST = 0.25, CREDIT = 8.0;  // payoff.py
constexpr int PAUSE = 16, LONGEST_PAUSE = 256;

std::array<double, AHEAD + 1> further() {
    std::array<double, AHEAD + 1> found;
    for (int m = 0; m <= AHEAD; m++) found[m] = (1 - std::pow(FALL, m)) / (1 - FALL);
    return found;
}
const std::array<double, AHEAD + 1> FURTHER = further();

struct Candidate {
    Token token;
    int agreed;  // the drafters that offer it, as bits
    double chance;
    int count;
    std::array<int32_t, MOST_PARTS + 1> features;  // without that of its depth
};

struct Node {
    int sequence;
    Token token;
    Node* parent;
    double score;
    int origin, depth;
    double mood;
    int index = -1;
    bool asked = false;
    std::array<int, MOST_PARTS> places{};
    std::vector<Candidate> candidates{};
    std::vector<Node*> below{};

    Node(int sequence, Token token, Node* parent, double score, int origin)
        : sequence(sequence), token(token), parent(parent), score(score), origin(origin),
          depth(parent ? parent->depth + 1 : 0), mood(parent ? parent->mood : 0) {}
};

struct Payoff {
    std::array<double, MOST_PARTS> balance{};
    std::array<int, MOST_PARTS> pause{}, left{};
};

// A text and what belongs to its request.
struct Planned : Text {
    std::vector<std::unique_ptr<Reader>> readers;
    Payoff payoff;
    uint32_t active = 0;  // the drafters that may draft, as bits
    double mood = 0;
    Node* root = nullptr;  // of the last plan
    uint64_t plan = 0;     // the number of that plan
    std::vector<int> origins;  // of its nodes
};

struct Entry {
    double score;  // negative
    uint64_t order;
    Node* node;
    const Candidate* candidate;  // null: the best child of the node may have this score
    bool operator<(const Entry& other) const { return score != other.score ? score > other.score : order > other.order; }
};

// The cost of a step, see redraft/core/cost.py: of each number of rows up to `known`, and `more` for each further one.
struct Cost {
    const double* times;
    int64_t known;
    double more, fixed, each;

    double of(int64_t rows) const {
        return (rows <= known ? times[rows] : times[known] + more * double(rows - known)) + fixed + each * double(rows);
    }
};

struct Asked {
    int64_t text, rows, depth, fresh;
};

struct Came {
    int64_t text, tokens, drafted, kept, steps, active, wait;
};

struct Output {
    int32_t *tokens, *parents;
    uint16_t* origins;
    float* scores;
    int32_t* counts;
};

class Planner {
   public:
    Planner(int parts, Source* const* given, double* weights, int32_t* counts, const int32_t* first)
        : parts(parts), sources(given, given + parts), weights(weights), seen(counts), first(first, first + parts), sets(1 << parts) {
        for (int n = 0; n <= MOST; n++) rates[n] = std::max(0.02, 0.5 / std::sqrt(1.0 + n));
    }

    Planned* begin(int64_t number, std::string tenant, int64_t prompt) {
        auto text = std::make_unique<Planned>();
        text->number = number;
        text->tenant = std::move(tenant);
        text->prompt = size_t(prompt);
        text->payoff.pause.fill(PAUSE);
        text->active = uint32_t(sets - 1);
        for (Source* source : sources) text->readers.push_back(source->begin(*text));
        return text.release();
    }

    void end(Planned* text, const Token* fresh, int64_t count) {
        const std::unique_ptr<Planned> owner(text);
        text->tokens.insert(text->tokens.end(), fresh, fresh + count);
        for (int i = 0; i < parts; i++)
            if (text->readers[i]) sources[i]->end(*text->readers[i], *text);
    }

    // The nodes of all texts, one after the other; returns their number.
    int64_t plan(const Asked* asked, int texts, const Token* fresh, const Cost* cost, int64_t rows, const Output& out) {
        plans++;
        nodes.clear();
        heap = {};
        int64_t limit = 0;
        std::vector<int64_t> most(texts);
        for (int s = 0; s < texts; s++) {
            auto& text = *reinterpret_cast<Planned*>(asked[s].text);
            text.root = nullptr;
            text.origins.clear();
            text.tokens.insert(text.tokens.end(), fresh, fresh + asked[s].fresh);
            fresh += asked[s].fresh;
            most[s] = cost ? asked[s].rows : std::min<int64_t>(asked[s].rows, FIXED_NODES);
            if (std::min(asked[s].rows, asked[s].depth) <= 0 || !text.active || text.tokens.empty()) continue;
            Node& root = nodes.emplace_back(s, -1, nullptr, 1.0, 0);
            text.root = &root;
            text.plan = plans;
            root.mood = text.mood;
            for (int i = 0; i < parts; i++) root.places[i] = text.active >> i & 1 ? start(i, text) : NOWHERE;
            expand(root);
            limit += most[s];
        }
        const int64_t best = choose(asked, texts, most, cost, rows, limit);
        std::fill(out.counts, out.counts + texts, 0);
        for (int64_t i = 0; i < best; i++) taken[i]->index = out.counts[taken[i]->sequence]++;
        std::vector<int64_t> begins(texts, 0);
        for (int s = 1; s < texts; s++) begins[s] = begins[s - 1] + out.counts[s - 1];
        for (int64_t i = 0; i < best; i++) {
            const Node& node = *taken[i];
            const int64_t at = begins[node.sequence] + node.index;
            out.tokens[at] = node.token;
            out.parents[at] = node.parent->index;
            out.origins[at] = uint16_t(node.origin);
            out.scores[at] = float(node.score);
            reinterpret_cast<Planned*>(asked[node.sequence].text)->origins.push_back(node.origin);
        }
        for (Source* source : sources) source->forget();
        return best;
    }

    void learn(Planned& text, const Token* tokens, int count) {
        const Node* node = text.plan == plans ? text.root : nullptr;
        double surprise = 0;
        for (int i = 0; i < count && node && node->asked; i++) {
            surprise += learn(node->depth + 1, node->candidates, tokens[i]);
            const auto& below = node->below;
            const auto next = std::find_if(below.begin(), below.end(), [&](const Node* child) { return child->token == tokens[i]; });
            node = next == below.end() ? nullptr : *next;
        }
        if (text.plan == plans && text.root)
            text.mood = std::min(std::max(text.mood + MOOD_RATE * surprise, -LARGEST_MOOD), LARGEST_MOOD);
    }

    // One step of a text with `drafted` nodes, of which those of `path` were kept; steps: so many have passed with it since the last call.
    void pay(Planned& text, int drafted, const int32_t* path, int kept, int steps, double token, double node, double drafting) {
        Payoff& payoff = text.payoff;
        if (int(text.origins.size()) != drafted) drafted = kept = 0;
        uint32_t lost = 0;
        if (text.active) {
            const double share = drafting / __builtin_popcount(text.active);
            for (int i = 0; i < parts; i++)
                if (text.active >> i & 1) payoff.balance[i] -= share;
            for (int i = 0; i < drafted; i++) payoff.balance[text.origins[i]] -= node;
            for (int i = 0; i < kept; i++) payoff.balance[text.origins[path[i]]] += token;
            for (int i = 0; i < parts; i++) {
                if (!(text.active >> i & 1)) continue;
                if (payoff.balance[i] < -PATIENCE * token * std::max(LEAST, double(PAUSE) / payoff.pause[i])) lost |= 1u << i;
                else if (payoff.balance[i] >= CREDIT * token) payoff.balance[i] = CREDIT * token, payoff.pause[i] = PAUSE;
            }
        }
        for (int i = 0; i < parts; i++) {
            if (lost >> i & 1) {
                payoff.left[i] = payoff.pause[i];
                payoff.pause[i] = std::min(2 * payoff.pause[i], LONGEST_PAUSE);
                payoff.balance[i] = 0;
            } else if (payoff.left[i]) {
                payoff.left[i] = std::max(0, payoff.left[i] - steps);
            }
            text.active = payoff.left[i] ? text.active & ~(1u << i) : text.active | 1u << i;
        }
    }

    const int parts;
    const std::vector<Source*> sources;

   private:
    int start(int i, Planned& text) {
        static Reader none;
        return sources[i]->start(text.readers[i] ? *text.readers[i] : none, text);
    }

    void push(double score, Node* node, const Candidate* candidate) { heap.push({score, order++, node, candidate}); }

    void expand(Node& node) {
        int asked = 0;
        merged.clear();
        for (int i = 0; i < parts; i++) {
            if (node.parent) node.places[i] = node.parent->places[i] == NOWHERE ? NOWHERE : sources[i]->follow(node.parent->places[i], node.token);
            if (node.places[i] == NOWHERE) continue;
            offers.clear();
            sources[i]->offers(node.places[i], offers);
            if (!offers.empty()) asked |= 1 << i;
            for (const Offer& offer : offers) {
                auto found = std::find_if(merged.begin(), merged.end(), [&](const Candidate& one) { return one.token == offer.token; });
                if (found == merged.end()) found = merged.insert(merged.end(), {offer.token, 0, 0.0, 1, {}});
                found->agreed |= 1 << i;
                found->features[found->count++] = first[i] + offer.bucket;
            }
        }
        const double begun = node.mood + weights[std::min(node.depth + 1, DEPTHS) - 1];
        double sum = 0;
        for (Candidate& candidate : merged) {
            candidate.features[0] = DEPTHS + asked * sets + candidate.agreed;
            double total = begun;
            for (int f = 0; f < candidate.count; f++) total += weights[candidate.features[f]];
            candidate.chance = total > -30 ? 1 / (1 + std::exp(-total)) : 0.0;
            sum += candidate.chance;
        }
        node.asked = true;
        node.candidates = merged;
        const double scale = sum <= 1 ? -node.score : -node.score / sum;
        for (const Candidate& candidate : node.candidates) push(scale * candidate.chance, &node, &candidate);
    }

    // Fills `taken` and returns how many of these are drafted.
    int64_t choose(const Asked* asked, int texts, const std::vector<int64_t>& most, const Cost* cost, int64_t rows, int64_t limit) {
        taken.clear();
        times.clear();
        for (int64_t k = 0; k <= limit; k++) times.push_back(cost ? cost->of(rows + k) : 1.0);
        std::vector<int64_t> used(texts, 0);
        double expected = texts, best = (1 + MARGIN) * texts / times[0];
        int64_t count = 0;
        while (!heap.empty() && int64_t(taken.size()) < limit) {
            const Entry entry = heap.top();
            heap.pop();
            Node& parent = *entry.node;
            const int s = parent.sequence;
            const auto k = int64_t(taken.size());
            if (used[s] == most[s]) continue;
            const double gain = -entry.score;
            bool pays = false;
            for (int64_t m = 1; m <= std::min<int64_t>(limit - k, AHEAD) && !pays; m++)
                pays = expected + gain * FURTHER[m] > best * times[k + m];
            if (!pays) break;
            if (!entry.candidate) {
                expand(parent);
                continue;
            }
            Node& node = nodes.emplace_back(s, entry.candidate->token, &parent, gain, __builtin_ctz(entry.candidate->agreed));
            parent.below.push_back(&node);
            taken.push_back(&node);
            used[s]++;
            expected += gain;
            if (expected > best * times[k + 1]) best = expected / times[k + 1], count = k + 1;
            if (node.depth < asked[s].depth) push(entry.score * LIKELIEST, &node, nullptr);
        }
        return count;
    }

    double learn(int depth, const std::vector<Candidate>& candidates, Token token) {
        double total = 0;
        const int common = std::min(depth, DEPTHS) - 1;
        for (const Candidate& candidate : candidates) {
            const double error = (candidate.token == token) - candidate.chance;
            total += error;
            if (-SURE < error && error < SURE) continue;
            step(common, error);
            for (int f = 0; f < candidate.count; f++) step(candidate.features[f], error);
        }
        return total;
    }

    void step(int feature, double error) {
        weights[feature] += error * rates[seen[feature]];
        if (seen[feature] < MOST) seen[feature]++;
    }

    double* const weights;
    int32_t* const seen;
    const std::vector<int32_t> first;
    const int sets;
    std::array<double, MOST + 1> rates;
    uint64_t plans = 0, order = 0;
    std::deque<Node> nodes;
    std::priority_queue<Entry> heap;
    std::vector<Node*> taken;
    std::vector<Candidate> merged;
    std::vector<Offer> offers;
    std::vector<double> times;
};

}  // namespace
}  // namespace redraft::draft

using namespace redraft::draft;

BORDER void rd_source_free(Source* source) { delete source; }
BORDER int64_t rd_source_units(const Source* source) { return source->units(); }
BORDER Memory* rd_source_snapshot(const Source* source) { return source->snapshot().release(); }
BORDER void rd_source_restore(Source* source, const Memory* memory) { source->restore(*memory); }
BORDER void rd_memory_free(Memory* memory) { delete memory; }

BORDER Planner* rd_planner(int32_t parts, Source* const* sources, double* weights, int32_t* counts, const int32_t* first) {
    return new Planner(parts, sources, weights, counts, first);
}
BORDER void rd_planner_free(Planner* planner) { delete planner; }

BORDER Planned* rd_text(Planner* planner, int64_t number, const char* tenant, int64_t length, int64_t prompt) {
    return planner->begin(number, std::string(tenant, size_t(length)), prompt);
}
BORDER void rd_text_end(Planner* planner, Planned* text, const Token* fresh, int64_t count) { planner->end(text, fresh, count); }

BORDER void rd_give(
    Planner* planner, Planned* text, int32_t part, const int32_t* parents, const Token* tokens, const int32_t* buckets, int32_t count) {
    give(*planner->sources[part], *text->readers[part], parents, tokens, buckets, count);
}

// The seconds that a drafter took for a text, beside those of all drafters together.
BORDER void rd_charge(Planned* text, int32_t part, double seconds) { text->payoff.balance[part] -= seconds; }

// cost: null where time must not decide.
BORDER int64_t rd_plan_drafts(
    Planner* planner, const Asked* asked, int32_t texts, const Token* fresh, const Cost* cost, int64_t rows, const Output* out) {
    return planner->plan(asked, texts, fresh, cost, rows, *out);
}

// tokens and paths: those of all texts, one after the other. token, node, drafting: see Prices in payoff.py; token < 0: unknown. The
// drafters that go on are written to `active` of each text, and the steps until one is tried again to `wait`.
BORDER void rd_learn_drafts(
    Planner* planner, Came* came, int32_t texts, const Token* tokens, const int32_t* paths, double token, double node, double drafting) {
    for (int s = 0; s < texts; s++) {
        auto& text = *reinterpret_cast<Planned*>(came[s].text);
        planner->learn(text, tokens, int(came[s].tokens));
        if (token >= 0) planner->pay(text, int(came[s].drafted), paths, int(came[s].kept), int(came[s].steps), token, node, drafting);
        tokens += came[s].tokens;
        paths += came[s].kept;
        came[s].active = text.active;
        const auto& left = text.payoff.left;
        came[s].wait = text.active ? 0 : *std::min_element(left.begin(), left.begin() + planner->parts);
    }
}
