// The compiled form of redraft/draft/suffix.py, which says what it does.
#include <algorithm>
#include <array>
#include <list>
#include <unordered_map>
#include <unordered_set>

#include "source.h"

namespace redraft::draft {
namespace {

constexpr int LONGEST = 20, START = 3, PLACES = 24, LATEST = 64, MOST = 128, OFFERS = 4;
constexpr std::array<int, 7> LENGTHS{1, 2, 3, 4, 6, 9, 15};
constexpr int64_t OWN = int64_t(1) << 62;

std::array<double, LONGEST + 1> weights() {
    std::array<double, LONGEST + 1> found{};
    double weight = 1;
    for (int length = LONGEST; length >= 0; length--, weight /= 4) found[length] = weight;
    return found;
}
const std::array<double, LONGEST + 1> WEIGHTS = weights();

struct Place {
    int64_t source;
    size_t at;
    bool operator==(const Place& other) const { return source == other.source && at == other.at; }
};

struct Match {
    int length;
    Place place;
    bool operator>(const Match& other) const {
        if (length != other.length) return length > other.length;
        return place.source != other.place.source ? place.source > other.place.source : place.at > other.place.at;
    }
};

struct Gram {
    int tenant;
    std::array<Token, START> tokens;
    bool operator==(const Gram& other) const { return tenant == other.tenant && tokens == other.tokens; }
};

struct Hash {
    size_t operator()(const Gram& gram) const {
        uint64_t hash = uint64_t(uint32_t(gram.tenant));
        for (Token token : gram.tokens) hash = (hash ^ uint32_t(token)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
        return hash;
    }
    size_t operator()(const Place& place) const { return (uint64_t(place.source) * 0x9e3779b97f4a7c15u) ^ place.at; }
};

struct Kept {
    int64_t number;
    std::string salt;
    int tenant;
    Tokens tokens;
};

struct History final : Memory {
    size_t limit = 0, size = 0;
    std::list<Kept> texts;  // the oldest first
    std::unordered_map<int64_t, std::list<Kept>::iterator> at;
    std::unordered_map<Gram, std::vector<Place>, Hash> index;
    std::unordered_map<std::string, std::pair<int, int>> tenants;  // number, texts
    int next = 0;

    explicit History(size_t limit) : limit(limit) {}
    History(const History& other) : limit(other.limit) {
        for (const Kept& kept : other.texts) add(kept.number, kept.salt, kept.tokens);
    }
    History& operator=(const History&) = delete;

    void put(const Text& text, size_t from) {
        drop(text.number);
        from = std::max(from, text.tokens.size() - std::min(limit, text.tokens.size()));
        if (from + START >= text.tokens.size()) return;
        add(text.number, text.tenant, Tokens(text.tokens.begin() + from, text.tokens.end()));
        while (size > limit) drop(texts.front().number);
    }

    void add(int64_t number, const std::string& salt, Tokens tokens) {
        auto& tenant = tenants.try_emplace(salt, next, 0).first->second;
        next += tenant.second++ == 0;
        texts.push_back({number, salt, tenant.first, std::move(tokens)});
        at[number] = std::prev(texts.end());
        const Kept& kept = texts.back();
        size += kept.tokens.size();
        for (size_t i = START; i < kept.tokens.size(); i++) index[gram(kept, i)].push_back({number, i});
    }

    void drop(int64_t number) {
        const auto found = at.find(number);
        if (found == at.end()) return;
        const Kept& kept = *found->second;
        std::unordered_set<Gram, Hash> seen;
        for (size_t i = START; i < kept.tokens.size(); i++) {
            const Gram one = gram(kept, i);
            if (!seen.insert(one).second) continue;
            const auto places = index.find(one);
            auto& all = places->second;
            all.erase(std::remove_if(all.begin(), all.end(), [&](const Place& place) { return place.source == number; }), all.end());
            if (all.empty()) index.erase(places);
        }
        const auto tenant = tenants.find(kept.salt);
        if (--tenant->second.second == 0) tenants.erase(tenant);
        size -= kept.tokens.size();
        texts.erase(found->second);
        at.erase(found);
    }

    static Gram gram(const Kept& kept, size_t i) { return {kept.tenant, {kept.tokens[i - 3], kept.tokens[i - 2], kept.tokens[i - 1]}}; }

    const Tokens* text(int64_t number) const {
        const auto found = at.find(number);
        return found == at.end() ? nullptr : &found->second->tokens;
    }
};

struct Matches final : Reader {
    std::unordered_map<Token, std::vector<size_t>> places;  // in the text, the oldest first
    std::unordered_map<uint64_t, std::vector<size_t>> pairs;
    std::vector<Match> found;  // of two tokens or more
    std::vector<uint32_t> marks;  // marks[at] == mark: `found` has this place of the text itself
    uint32_t mark = 0;
    size_t seen = 0;

    void catch_up(const Text& text, const History& history) {
        const Tokens& tokens = text.tokens;
        for (; seen < tokens.size(); seen++) {
            const uint64_t before = seen ? uint32_t(tokens[seen - 1]) : uint32_t(-1);
            auto& own = pairs[before << 32 | uint32_t(tokens[seen])];
            if (seen + LONGEST >= tokens.size()) read(text, history, seen, own);
            own.push_back(seen + 1);
            places[tokens[seen]].push_back(seen + 1);
        }
    }

    void read(const Text& text, const History& history, size_t i, const std::vector<size_t>& own) {
        const Tokens& tokens = text.tokens;
        marks.resize(tokens.size() + 2, 0);
        mark++;
        size_t kept = 0;
        for (const Match& match : found) {
            const Tokens* other = match.place.source == OWN ? &tokens : history.text(match.place.source);
            if (!other || match.place.at >= other->size() || (*other)[match.place.at] != tokens[i]) continue;
            const Match longer{std::min(match.length + 1, LONGEST), {match.place.source, match.place.at + 1}};
            if (longer.place.source == OWN) marks[longer.place.at] = mark;
            found[kept++] = longer;
        }
        found.resize(kept);
        for (size_t j = own.size() - std::min<size_t>(own.size(), LATEST); j < own.size(); j++)
            if (marks[own[j]] != mark) found.push_back({2, {OWN, own[j]}}), marks[own[j]] = mark;
        if (i + 1 >= START && !history.texts.empty()) {
            const auto known = history.tenants.find(text.tenant);
            if (known != history.tenants.end()) earlier(history, {known->second.first, {tokens[i - 2], tokens[i - 1], tokens[i]}}, kept);
        }
        if (found.size() > MOST) {
            std::nth_element(found.begin(), found.begin() + MOST, found.end(), std::greater<Match>());
            found.resize(MOST);
        }
    }

    void earlier(const History& history, const Gram& gram, size_t kept) {
        const auto all = history.index.find(gram);
        if (all == history.index.end()) return;
        const auto& some = all->second;
        for (size_t j = some.size() - std::min<size_t>(some.size(), LATEST); j < some.size(); j++) {
            const bool followed = std::any_of(found.begin(), found.begin() + kept, [&](const Match& m) { return m.place == some[j]; });
            if (!followed) found.push_back({START, some[j]});
        }
    }
};

struct Voter {
    int length;
    int64_t source;
    size_t at;
    const Tokens* text;
};

// The voters at a place, the longest matches first, and the groups that agree.
struct Votes {
    int count = 0, groups = 0;
    std::array<Voter, PLACES> voters;
    std::array<int, PLACES> group;  // of each voter, -1: the text ends there
    std::array<Token, PLACES> tokens;
    std::array<double, PLACES> weights;

    void add(const Voter& voter) { voters[count++] = voter; }

    void vote() {
        for (int i = 0; i < count; i++) {
            const Voter& voter = voters[i];
            group[i] = -1;
            if (voter.at >= voter.text->size()) continue;
            const Token token = (*voter.text)[voter.at];
            int g = 0;
            while (g < groups && tokens[g] != token) g++;
            if (g == groups) tokens[groups] = token, weights[groups++] = 0;
            weights[g] += WEIGHTS[voter.length];
            group[i] = g;
        }
    }
};

class Suffix final : public Source {
   public:
    explicit Suffix(size_t limit) : history(std::make_unique<History>(limit)) {}

    std::unique_ptr<Reader> begin(const Text&) override { return std::make_unique<Matches>(); }

    void end(Reader&, const Text& text) override { history->put(text, text.prompt + 1 > START ? text.prompt + 1 - START : 0); }

    void forget() override { all.clear(); }

    int start(Reader& reader, const Text& text) override {
        auto& matches = static_cast<Matches&>(reader);
        matches.catch_up(text, *history);
        auto& found = matches.found;
        const size_t most = std::min<size_t>(found.size(), PLACES);
        std::partial_sort(found.begin(), found.begin() + most, found.end(), std::greater<Match>());
        Votes votes;
        for (size_t i = 0; i < most; i++) {
            const Tokens* other = found[i].place.source == OWN ? &text.tokens : history->text(found[i].place.source);
            if (!other) other = &nothing;
            votes.add({found[i].length, found[i].place.source, found[i].place.at, other});
        }
        if (most < PLACES) {  // matches of one token
            const auto& places = matches.places[text.tokens.back()];
            const size_t first = places.size() - std::min<size_t>(places.size(), 2 * PLACES);
            for (size_t j = places.size(); j-- > first && votes.count < PLACES;) {
                const size_t at = places[j];
                if (at < text.tokens.size() && matches.marks[at] != matches.mark) votes.add({1, OWN, at, &text.tokens});
            }
        }
        return votes.count ? place(votes) : NOWHERE;
    }

    int follow(int from, Token token) override {
        const Votes& above = all[from];
        int g = 0;
        while (g < above.groups && above.tokens[g] != token) g++;
        if (g == above.groups) return NOWHERE;
        Votes votes;
        for (int i = 0; i < above.count; i++) {
            const Voter& voter = above.voters[i];
            if (above.group[i] == g) votes.add({std::min(voter.length + 1, LONGEST), voter.source, voter.at + 1, voter.text});
        }
        return place(votes);
    }

    void offers(int from, std::vector<Offer>& found) override {
        const Votes& votes = all[from];
        if (!votes.groups) return;
        const int longest = votes.voters[0].length;
        const int base = 8 * int(std::upper_bound(LENGTHS.begin(), LENGTHS.end(), longest) - LENGTHS.begin()) - 8;
        if (votes.groups == 1) return found.push_back({votes.tokens[0], base + 7});
        double total = 0;
        std::array<int, PLACES> order;
        for (int g = 0; g < votes.groups; g++) total += votes.weights[g], order[g] = g;
        std::stable_sort(order.begin(), order.begin() + votes.groups, [&](int a, int b) { return votes.weights[a] > votes.weights[b]; });
        for (int i = 0; i < std::min(votes.groups, OFFERS); i++) {
            const int g = order[i];
            const double weight = votes.weights[g];
            const int first = int(std::find(votes.group.begin(), votes.group.begin() + votes.count, g) - votes.group.begin());
            const int share = (weight > 0.2 * total) + (weight > 0.5 * total) + (weight > 0.9 * total);
            const bool top = std::min(votes.voters[first].length, LONGEST - 1) == std::min(longest, LONGEST - 1);
            found.push_back({votes.tokens[g], base + 2 * share + top});
        }
    }

    int64_t units() const override { return int64_t(history->size); }
    std::unique_ptr<Memory> snapshot() const override { return std::make_unique<History>(*history); }
    void restore(const Memory& memory) override { history = std::make_unique<History>(static_cast<const History&>(memory)); }

   private:
    int place(Votes& votes) {
        votes.vote();
        all.push_back(votes);
        return int(all.size()) - 1;
    }

    std::unique_ptr<History> history;
    std::vector<Votes> all;
    const Tokens nothing;
};

}  // namespace
}  // namespace redraft::draft

BORDER redraft::draft::Source* rd_suffix(int64_t history) { return new redraft::draft::Suffix(size_t(history)); }
