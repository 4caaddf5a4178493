// Drawing a token from a row of logits; what a draw is, executor/model/draw.py says.
//
//     row ─▶ blocks of 256 tokens: their highest logits, their sums of weights
//                │ top-k, top-p: candidates ─▶ the lowest logit that is kept    (draw_select.h)
//                ▼
//            sums of what is kept ─▶ the block in which the running sum passes ─▶ the token in it
//
// All filters become one comparison with a logit, and a block whose highest logit is lower is not
// looked at: neither does it hold a token that is kept, nor one that weighs anything. Blocks have their
// highest logits from the search for the row's best token, where that is done here too.
#pragma once

#include <cstdint>

namespace pf {

struct DrawRow {
    const float* logits;  // [vocab_size], minus infinity where a token is impossible
    int64_t vocab_size;
    float best;  // the highest of them, finite
    float temperature;
};

struct DrawFilters {
    int64_t top_k;  // vocab_size, or more, keeps all
    double top_p;   // 1 keeps all
    float min_p;    // 0 keeps all
};

// The highest logit of a row, and a token: the first that has it, unless something else is said. NaN,
// and any token, for a row with a NaN.
struct BestToken {
    float logit;
    int64_t token_id;
};

// How to draw: a temperature above zero, filters, and a number in [0, 1).
struct DrawTerms {
    float temperature;
    DrawFilters filters;
    double uniform;
};

// Bytes that a thread needs for rows of such a size: a multiple of 64.
int64_t draw_scratch_bytes(int64_t vocab_size);

// The token at which the running sum of kept weights passes `uniform`, in [0, 1), of their total; -1
// where `best` is none of the row's logits.
int64_t draw_token(const DrawRow& row, const DrawFilters& filters, double uniform, void* scratch);

BestToken best_token(const float* logits, int64_t vocab_size, void* scratch);

// The logit of the best token and the one that is drawn, which is the best itself unless its logit is
// finite.
BestToken draw_token(const float* logits, int64_t vocab_size, const DrawTerms& terms, void* scratch);

// Sum of all weights, in parts of 2^-40.
int64_t total_weight(const DrawRow& row, void* scratch);

}  // namespace pf
