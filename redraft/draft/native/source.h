// The compiled form of redraft/draft/source.py: how a drafter offers single tokens to the planner.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#define BORDER extern "C" __attribute__((visibility("default")))

namespace redraft::draft {

using Token = int32_t;
using Tokens = std::vector<Token>;

struct Offer {
    Token token;
    int32_t bucket;
};

constexpr int NOWHERE = -1;  // the place at which a drafter knows nothing

// What a drafter keeps of one text.
struct Reader {
    virtual ~Reader() = default;
};

struct Text {
    int64_t number;
    std::string tenant;
    size_t prompt;  // its tokens
    Tokens tokens;
};

// What a drafter keeps of all texts, as it was.
struct Memory {
    virtual ~Memory() = default;
};

// Places are numbers that are valid until `forget`.
class Source {
   public:
    virtual ~Source() = default;
    virtual std::unique_ptr<Reader> begin(const Text& text) = 0;
    virtual void end(Reader&, const Text&) {}
    virtual void forget() {}
    virtual int start(Reader& reader, const Text& text) = 0;
    virtual int follow(int place, Token token) = 0;
    virtual void offers(int place, std::vector<Offer>& found) = 0;
    virtual int64_t units() const { return 0; }  // of memory; what a unit takes is for the drafter to say
    virtual std::unique_ptr<Memory> snapshot() const { return nullptr; }
    virtual void restore(const Memory&) {}
};

// In trees.cpp: the tree of one text for the next plan. parents (-1: the root), tokens and buckets [count].
void give(Source& source, Reader& reader, const int32_t* parents, const Token* tokens, const int32_t* buckets, int count);

}  // namespace redraft::draft
