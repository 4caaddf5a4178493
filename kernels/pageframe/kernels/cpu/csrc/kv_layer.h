// Where keys and values of one layer lie: the arena of kernels/layouts.py, seen through one group
// of block tables.
//
//     payload  [num_layers, 2, block_size, num_kv_heads, head_dim]   of one block
//     scales   [num_layers, 2, block_size, num_kv_heads]             float32, int8 only
#pragma once

#include <cstddef>
#include <cstdint>

#include "pageframe_cpu.h"

namespace pf {

enum class KvSide : int32_t { kKeys = 0, kValues = 1 };

inline int64_t dtype_bytes(int32_t dtype) { return dtype == PF_F32 ? 4 : dtype == PF_BF16 ? 2 : 1; }

// One layer of the pool: what to add to the address of a block.
class KvLayer {
public:
    // `place` is the layer's place among the layers of a block.
    KvLayer(const pf_kv_arena& arena, int64_t place)
        : arena_(arena),
          head_bytes_(arena.head_dim * dtype_bytes(arena.dtype)),
          token_bytes_(arena.num_kv_heads * head_bytes_),
          payload_(static_cast<uint8_t*>(arena.blocks) + place * 2 * arena.block_size * token_bytes_),
          scales_(static_cast<uint8_t*>(arena.blocks) + arena.payload_bytes +
                  place * 2 * arena.block_size * arena.num_kv_heads * kScaleBytes) {}

    // The channels of one token and head.
    uint8_t* row(KvSide side, int64_t block, int64_t offset, int64_t head) const {
        const int64_t token = static_cast<int64_t>(side) * arena_.block_size + offset;
        return payload_ + block * arena_.block_bytes + token * token_bytes_ + head * head_bytes_;
    }

    // What the stored channels of one token and head are multiplied by; PF_INT8 only.
    float* scale(KvSide side, int64_t block, int64_t offset, int64_t head) const {
        const int64_t token = static_cast<int64_t>(side) * arena_.block_size + offset;
        return reinterpret_cast<float*>(scales_ + block * arena_.block_bytes +
                                        (token * arena_.num_kv_heads + head) * kScaleBytes);
    }

    const pf_kv_arena& arena() const { return arena_; }
    int64_t head_bytes() const { return head_bytes_; }
    int64_t token_bytes() const { return token_bytes_; }
    // From a token's keys to its values, in bytes; and from the scale of the one to that of the other.
    int64_t side_bytes() const { return arena_.block_size * token_bytes_; }
    int64_t side_scales() const { return arena_.block_size * arena_.num_kv_heads; }

private:
    static constexpr int64_t kScaleBytes = 4;

    pf_kv_arena arena_;
    int64_t head_bytes_;
    int64_t token_bytes_;
    uint8_t* payload_;
    uint8_t* scales_;
};

// Block table of one sequence in one group of layers: entry `logical * stride`.
struct BlockTable {
    const int32_t* entries;
    int64_t stride;

    int64_t operator[](int64_t logical) const { return entries[logical * stride]; }
};

}  // namespace pf
