// The compiled form of redraft/draft/ngram.py, which says what it does.
#include <algorithm>
#include <array>
#include <list>
#include <unordered_map>

#include "source.h"

namespace redraft::draft {
namespace {

constexpr size_t ORDER = 3, WIDTH = 3, TENANTS = 64;

// The last tokens: ORDER of them, or one fewer, then the first is NONE.
constexpr Token NONE = -1;
using Context = std::array<Token, ORDER>;

struct Hash {
    size_t operator()(const Context& context) const {
        uint64_t hash = 0;
        for (Token token : context) hash = (hash ^ uint32_t(token)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
        return hash;
    }
};

struct Count {
    Token token;
    int64_t count;
};
using Counts = std::vector<Count>;  // in the order in which the tokens came first

struct Table {
    size_t limit;
    std::unordered_map<Context, Counts, Hash> young, old;

    explicit Table(size_t limit) : limit(limit) {}
    size_t size() const { return young.size() + old.size(); }

    void learn(const Tokens& tokens, size_t from) {
        for (size_t i = std::max(from, ORDER - 1); i < tokens.size(); i++) {
            add({NONE, tokens[i - 2], tokens[i - 1]}, tokens[i]);
            if (i >= ORDER) add({tokens[i - 3], tokens[i - 2], tokens[i - 1]}, tokens[i]);
        }
        if (young.size() > limit) {
            old = std::move(young);
            young = {};
        }
    }

    void add(const Context& context, Token token) {
        const auto [at, fresh] = young.try_emplace(context);
        Counts& counts = at->second;
        if (fresh && !old.empty()) {
            if (const auto found = old.find(context); found != old.end()) {
                counts = std::move(found->second);
                old.erase(found);
            }
        }
        const auto known = std::find_if(counts.begin(), counts.end(), [&](const Count& one) { return one.token == token; });
        if (known == counts.end())
            counts.push_back({token, 1});
        else
            known->count++;
    }

    const Counts* find(const Context& context) const {
        if (const auto found = young.find(context); found != young.end()) return &found->second;
        if (const auto found = old.find(context); found != old.end()) return &found->second;
        return nullptr;
    }
};

struct Tenant {
    std::string salt;
    std::shared_ptr<Table> table;
};

struct Tables final : Memory {
    std::list<Tenant> all;  // the one that was idle longest first
};

struct Counted final : Reader {
    std::shared_ptr<Table> table;
    size_t seen = 0;

    void catch_up(const Text& text) {
        if (seen < text.tokens.size()) table->learn(text.tokens, seen);
        seen = text.tokens.size();
    }
};

struct Place {
    const Table* table;
    Context context;
};

class NGram final : public Source {
   public:
    explicit NGram(size_t limit) : limit(limit) {}

    std::unique_ptr<Reader> begin(const Text& text) override {
        auto reader = std::make_unique<Counted>();
        auto& all = tables.all;
        const auto known = std::find_if(all.begin(), all.end(), [&](const Tenant& one) { return one.salt == text.tenant; });
        if (known == all.end())
            all.push_back({text.tenant, std::make_shared<Table>(limit / 2)});
        else
            all.splice(all.end(), all, known);
        reader->table = all.back().table;
        while (all.size() > 1 && (all.size() > TENANTS || size_t(units()) > 2 * limit)) all.pop_front();
        return reader;
    }

    void end(Reader& reader, const Text& text) override { static_cast<Counted&>(reader).catch_up(text); }

    void forget() override { places.clear(); }

    int start(Reader& reader, const Text& text) override {
        auto& counted = static_cast<Counted&>(reader);
        counted.catch_up(text);
        Context context{NONE, NONE, NONE};
        const size_t known = std::min(text.tokens.size(), ORDER);
        std::copy(text.tokens.end() - known, text.tokens.end(), context.end() - known);
        return place({counted.table.get(), context});
    }

    int follow(int from, Token token) override {
        const Place& above = places[from];
        return place({above.table, {above.context[1], above.context[2], token}});
    }

    void offers(int from, std::vector<Offer>& found) override {
        const auto& [table, context] = places[from];
        int order = 0;
        const Counts* counts = context[0] == NONE ? nullptr : table->find(context);
        if (!counts) {
            order = 1;
            counts = context[1] == NONE ? nullptr : table->find({NONE, context[1], context[2]});
            if (!counts) return;
        }
        int64_t total = 0;
        std::array<Count, WIDTH> best;
        size_t kept = 0;
        for (const Count& one : *counts) {  // equal counts: those that came first stay first
            total += one.count;
            size_t at = kept;
            while (at && best[at - 1].count < one.count) at--;
            if (at == WIDTH) continue;
            kept = std::min(kept + 1, WIDTH);
            for (size_t i = kept - 1; i > at; i--) best[i] = best[i - 1];
            best[at] = one;
        }
        for (size_t i = 0; i < kept; i++) {
            const auto [token, count] = best[i];
            const int share = counts->size() == 1 ? 3 : (count * 4 > total) + (count * 2 > total);
            found.push_back({token, 16 * order + 4 * share + int(std::min<int64_t>(count, 4)) - 1});
        }
    }

    int64_t units() const override {
        size_t total = 0;
        for (const Tenant& one : tables.all) total += one.table->size();
        return int64_t(total);
    }

    std::unique_ptr<Memory> snapshot() const override {
        auto copy = std::make_unique<Tables>();
        for (const Tenant& one : tables.all) copy->all.push_back({one.salt, std::make_shared<Table>(*one.table)});
        return copy;
    }

    void restore(const Memory& memory) override {
        tables.all.clear();
        for (const Tenant& one : static_cast<const Tables&>(memory).all)
            tables.all.push_back({one.salt, std::make_shared<Table>(*one.table)});
    }

   private:
    int place(const Place& one) {
        places.push_back(one);
        return int(places.size()) - 1;
    }

    size_t limit;
    Tables tables;
    std::vector<Place> places;
};

}  // namespace
}  // namespace redraft::draft

BORDER redraft::draft::Source* rd_ngram(int64_t history) { return new redraft::draft::NGram(size_t(history)); }
