// Keys that several sequences share, taken in once for all of them (attention_plan.h).
//
// A tile of keys is found and brought once, and used by the rows of all members. What is done to a row
// is what its own sequence would do alone, tile after tile; then its state is left in memory, channels
// in order, and the sequence's own tile goes on from there. To merge two softmaxes instead, as Hydragen
// and FlashInfer's cascades do, would make the bits of a sequence depend on who shares with it.
#pragma once

#include "attention.h"
#include "attention_rows.h"

namespace pf {

// Floats that the states of a plan take.
int64_t shared_state_floats(const AttentionPlan& plan, const HeadShape& shape);

// State `index` of a plan: the rows of one token and KV head.
RowState shared_state(const AttentionCall& call, int64_t index);

// One phase of a run.
void attend_shared(Worker& worker, const AttentionCall& call);

}  // namespace pf
