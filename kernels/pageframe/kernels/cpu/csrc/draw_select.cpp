#include "draw_select.h"

#include <algorithm>
#include <cfloat>

namespace pf {

namespace {

// A bit for each lane of a mask.
PF_INLINE uint32_t bits_of(i32v mask) {
#if defined(__AVX512DQ__) && !defined(PF_LANES)
    return static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)mask));
#elif defined(__AVX2__) && !defined(PF_LANES)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__) && !defined(PF_LANES)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; lane++) bits |= (mask[lane] & 1u) << lane;
    return bits;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(PF_LANES)
// For each set of lanes, which they are, one behind the other.
struct LaneTable {
    constexpr LaneTable() {
        for (int bits = 0; bits < 1 << kLanes; bits++)
            for (int lane = 0, place = 0; lane < kLanes; lane++)
                if (bits >> lane & 1) lanes[bits][place++] = static_cast<uint8_t>(lane);
    }
    alignas(64) uint8_t lanes[1 << kLanes][kLanes]{};
};
constexpr LaneTable kLanesOf;
#endif

// Writes the lanes whose bits are set, one behind the other. What follows them, up to a whole vector,
// may be anything then.
PF_INLINE void store_lanes(float* to, f32v values, uint32_t bits) {
#if defined(__AVX512F__) && !defined(PF_LANES)
    store(to, (f32v)_mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)values));
#elif defined(__AVX2__) && !defined(PF_LANES)
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanesOf.lanes[bits]));
    store(to, (f32v)_mm256_permutevar8x32_ps((__m256)values, _mm256_cvtepu8_epi32(lanes)));
#else
    for (; bits != 0; bits &= bits - 1) *to++ = values[__builtin_ctz(bits)];
#endif
}

// With fewer candidates, going through the buckets takes longer than it saves.
constexpr int64_t kNumToNarrow = 512;

}  // namespace

int64_t gather(const float* logits, int64_t num_logits, float cut, float* to) {
    int64_t num = 0;
    for (int64_t i = 0; i < num_logits; i += kLanes) {
        const f32v values = load(logits + i);
        uint32_t bits = bits_of(values >= splat(cut));
        if (bits == 0) continue;
        if (num_logits - i < kLanes) bits &= (1u << (num_logits - i)) - 1;
        store_lanes(to + num, values, bits);
        num += __builtin_popcount(bits);
    }
    return num;
}

void Candidates::count_ones() {
    // The smallest weight there is makes one of the sum.
    std::fill_n(counts_, num_, 1.0f / kHalfOne);
    pad();
}

void Candidates::count_weights(const Weighing& weighing) {
    pad();
    for (int64_t i = 0; i < num_; i += kLanes) {
        f32v weights[1] = {load(logits_ + i)};
        weighing.weigh(weights);
        store(counts_ + i, weights[0]);
    }
    pad();
}

// Makes the last vector whole, with what counts nothing.
void Candidates::pad() {
    store(counts_ + num_, f32v{});
    store(logits_ + num_, splat(-__builtin_inff()));
}

int64_t Candidates::num_from(float pivot) const {
    int64_t sum = 0;
    for (int64_t first = 0; first < num_; first += WholeSum::kNumVectorsMax * kLanes) {
        const int64_t end = std::min(num_, first + WholeSum::kNumVectorsMax * kLanes);
        WholeSum part;
        for (int64_t i = first; i < end; i += kLanes)
            part.add<1>({load(logits_ + i) >= splat(pivot) ? load(counts_ + i) : f32v{}});
        sum += part.total();
    }
    return sum;
}

template <bool keeps_above>
void Candidates::keep(float pivot) {
    int64_t num_kept = 0;
    for (int64_t i = 0; i < num_; i++) {
        const float logit = logits_[i];
        logits_[num_kept] = logit;
        counts_[num_kept] = counts_[i];
        num_kept += keeps_above ? logit > pivot : logit < pivot;
    }
    num_ = num_kept;
    pad();
}

// The middle one of three, taken by chance from a fixed sequence: no order of logits is bad twice.
float Candidates::pick_pivot() {
    float picked[3];
    for (float& pick : picked) {
        random_ = random_ * 1664525u + 1013904223u;
        pick = logits_[(static_cast<uint64_t>(random_) * static_cast<uint64_t>(num_)) >> 32];
    }
    const auto [low, high] = std::minmax(picked[0], picked[1]);
    return std::clamp(picked[2], low, high);
}

int64_t Candidates::narrow(double goal) {
    const Buckets buckets = spread();
    int64_t counts[Buckets::kNum] = {};
    for (int64_t i = 0; i < num_; i += kLanes) {
        int32_t of[kLanes];
        store_as(of, buckets.of(load(logits_ + i)));
        // The last vector is made whole with what counts nothing.
        for (int lane = 0; lane < kLanes; lane++)
            counts[of[lane]] += static_cast<int64_t>(counts_[i + lane] * kHalfOne);
    }
    int64_t num_higher = 0;
    int bucket = 0;
    while (bucket < Buckets::kNum && static_cast<double>(num_higher + counts[bucket]) < goal)
        num_higher += counts[bucket++];
    int64_t num_kept = 0;
    for (int64_t i = 0; i < num_; i += kLanes) {
        const f32v logits = load(logits_ + i), their_counts = load(counts_ + i);
        uint32_t bits = bits_of(buckets.of(logits) == bucket);
        if (num_ - i < kLanes) bits &= (1u << (num_ - i)) - 1;
        store_lanes(logits_ + num_kept, logits, bits);
        store_lanes(counts_ + num_kept, their_counts, bits);
        num_kept += __builtin_popcount(bits);
    }
    num_ = num_kept;
    pad();
    return num_higher;
}

Candidates::Buckets Candidates::spread() const {
    f32v highest = load(logits_), lowest = highest;
    int64_t i = 0;
    for (; i + kLanes <= num_; i += kLanes) {
        highest = max(highest, load(logits_ + i));
        lowest = min(lowest, load(logits_ + i));
    }
    // Behind the last logit stands minus infinity. Logits below the lowest that was seen share the
    // last bucket with it.
    if (i < num_) highest = max(highest, load(logits_ + i));
    const float top = max_lanes(highest);
    return {top, std::min(Buckets::kNum / (top + max_lanes(-lowest)), FLT_MAX)};
}

float Candidates::select(double goal) {
    float found = -__builtin_inff();
    // Count of those that were dropped for being above the answer.
    int64_t num_higher = num_ < kNumToNarrow ? 0 : narrow(goal);
    while (num_ > 0) {
        const float pivot = pick_pivot();
        const int64_t num = num_higher + num_from(pivot);
        if (static_cast<double>(num) >= goal) {
            found = pivot;
            keep<true>(pivot);
        } else {
            num_higher = num;
            keep<false>(pivot);
        }
    }
    return found;
}

}  // namespace pf
