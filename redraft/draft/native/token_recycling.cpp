// The compiled form of the offers of redraft/draft/token_recycling.py; the matrix stays there.
#include "source.h"

namespace redraft::draft {
namespace {

// matrix: [vocab, width], successors of each token, the likeliest first, -1: unknown. A place is a token.
class Successors final : public Source {
   public:
    Successors(const Token* matrix, int64_t vocab, int64_t width, int offered)
        : matrix(matrix), vocab(vocab), width(width), offered(offered) {}

    std::unique_ptr<Reader> begin(const Text&) override { return nullptr; }
    int start(Reader&, const Text& text) override { return text.tokens.back(); }
    int follow(int, Token token) override { return token; }

    void offers(int place, std::vector<Offer>& found) override {
        if (place >= vocab) return;  // another drafter's token, which the engine will refuse
        const Token* row = matrix + place * width;
        for (int rank = 0; rank < offered && rank < width; rank++)
            if (row[rank] >= 0) found.push_back({row[rank], rank});
    }

   private:
    const Token* matrix;
    int64_t vocab, width;
    int offered;
};

}  // namespace
}  // namespace redraft::draft

BORDER redraft::draft::Source* rd_successors(const int32_t* matrix, int64_t vocab, int64_t width, int64_t offered) {
    return new redraft::draft::Successors(matrix, vocab, width, int(offered));
}
