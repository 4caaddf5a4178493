// Put one token's keys or values of one head into the pool, in the pool's type.
#pragma once

#include <cstdint>

#include "kv_layer.h"

namespace pf {

// Channels [head_dim] of one side, token and head; int8 with a scale of its own, bit for bit as
// kernels/reference/quantise.py has it.
void kv_write(const KvLayer& layer, KvSide side, int64_t slot, int64_t head, const float* channels);

}  // namespace pf
