#include "kv_write.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "simd.h"

namespace pf {
namespace {

constexpr float kStoredMax = 127.0f;

// The largest magnitude; NaN if there is one.
float largest(const float* channels, int64_t count) {
    f32v most{};
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
        const f32v value = load(channels + c);
        const f32v size = select(value != value, value, max(value, -value));
        most = select((size > most) | (size != size), size, most);
    }
    float result = 0.0f;
    const auto take = [&](float size) {
        if (size > result || size != size) result = size;
    };
    for (int i = 0; i < kLanes; i++) take(most[i]);
    for (; c < count; c++) take(std::fabs(channels[c]));
    return result;
}

// To the nearest whole number, ties to even, of what is at most a little more than 127.
int8_t nearest(float quotient) { return static_cast<int8_t>(std::nearbyintf(quotient)); }

float quantise(const float* channels, int64_t count, int8_t* to) {
    const float unit = largest(channels, count) / kStoredMax;
    const float tiny = std::numeric_limits<float>::min();
    const float scale = unit < tiny ? tiny : unit;
    // A row that is not finite has no finite scale, whatever is stored: zeros.
    const bool is_finite = std::isfinite(scale);
    for (int64_t c = 0; c < count; c++) to[c] = is_finite ? nearest(channels[c] / scale) : int8_t{0};
    return scale;
}

}  // namespace

void kv_write(const KvLayer& layer, KvSide side, int64_t slot, int64_t head,
              const float* channels) {
    const pf_kv_arena& arena = layer.arena();
    const int64_t block = slot / arena.block_size, offset = slot % arena.block_size;
    uint8_t* row = layer.row(side, block, offset, head);
    switch (arena.dtype) {
        case PF_F32:
            std::memcpy(row, channels, sizeof(float) * static_cast<size_t>(arena.head_dim));
            return;
        case PF_BF16: {
            bf16* to = reinterpret_cast<bf16*>(row);
            int64_t c = 0;
            for (; c + kLanes <= arena.head_dim; c += kLanes) store(to + c, load(channels + c));
            for (; c < arena.head_dim; c++) to[c] = to_bf16(channels[c]);
            return;
        }
        case PF_INT8:
            *layer.scale(side, block, offset, head) =
                quantise(channels, arena.head_dim, reinterpret_cast<int8_t*>(row));
            return;
    }
}

}  // namespace pf
