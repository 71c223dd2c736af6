// Trees that a drafter without a compiled form proposed, see Trees in redraft/draft/source.py.
#include "source.h"

namespace redraft::draft {
namespace {

struct Given final : Reader {
    int first = NOWHERE;  // the place of its root, until `forget`
};

class Trees final : public Source {
   public:
    std::unique_ptr<Reader> begin(const Text&) override { return std::make_unique<Given>(); }

    void forget() override { nodes.clear(); }

    // The tree of one text for the next plan: parents, -1 for the root, tokens and buckets [count].
    void give(Reader& reader, const int32_t* parents, const Token* tokens, const int32_t* buckets, int count) {
        auto& given = static_cast<Given&>(reader);
        given.first = int(nodes.size());
        nodes.push_back({NOWHERE, 0, 0});
        for (int i = 0; i < count; i++) nodes.push_back({given.first + 1 + parents[i], tokens[i], buckets[i]});
        nodes.push_back({NOWHERE, 0, 0});  // between this tree and the next
    }

    int start(Reader& reader, const Text&) override {
        auto& given = static_cast<Given&>(reader);
        const int first = given.first;
        given.first = NOWHERE;
        return first;
    }

    int follow(int place, Token token) override {
        for (size_t i = size_t(place) + 1; i < nodes.size() && nodes[i].parent != NOWHERE; i++)
            if (nodes[i].parent == place && nodes[i].token == token) return int(i);
        return NOWHERE;
    }

    void offers(int place, std::vector<Offer>& found) override {
        for (size_t i = size_t(place) + 1; i < nodes.size() && nodes[i].parent != NOWHERE; i++)
            if (nodes[i].parent == place) found.push_back({nodes[i].token, nodes[i].bucket});
    }

   private:
    struct Node {
        int parent;
        Token token;
        int bucket;
    };
    std::vector<Node> nodes;
};

}  // namespace

void give(Source& source, Reader& reader, const int32_t* parents, const Token* tokens, const int32_t* buckets, int count) {
    static_cast<Trees&>(source).give(reader, parents, tokens, buckets, count);
}

}  // namespace redraft::draft

BORDER redraft::draft::Source* rd_trees() { return new redraft::draft::Trees; }
