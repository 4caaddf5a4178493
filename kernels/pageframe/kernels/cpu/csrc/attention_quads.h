// `absorb` (attention_rows.h) for int8 keys and values in whole numbers (kv_quads.h).
#pragma once

#include <cstdint>

#include "attention_rows.h"

namespace pf {

// As place_query; in `to`: high bytes, low bytes, what they are multiplied by, and what a score has too
// much because keys are unsigned.
void place_quad_query(const float* query, int64_t head_dim, float* to);

void absorb_quads(const RowState& state, const float* queries, const HeadRows& rows, KvTile& tile,
                  Lanes lanes, int64_t head_dim);

// As num_asks.
int64_t num_quad_asks(int64_t num_rows);

}  // namespace pf
