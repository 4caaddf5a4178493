// Vectors of `kLanes` floats, the same source for every instruction set.
//
// GCC's and Clang's vector extensions give arithmetic, comparison and conversion; only what they
// lack (a fused multiply-add) is written per instruction set. `kLanes` follows from the compiler's
// flags: 4 (SSE, NEON), 8 (AVX2), 16 (AVX-512). PF_LANES=16 forces a width that the machine lacks:
// the compiler then splits each operation, which is how AVX-512 code is tested without AVX-512.
//
// Every function here is elementwise unless its name says lanes; none depends on rounding modes.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PF_INLINE inline __attribute__((always_inline))

namespace pf {

#if defined(PF_LANES)
inline constexpr int kLanes = PF_LANES;
#elif defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using bf16 = uint16_t;  // the upper half of a float's bits

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));  // also the type of a mask: 0 or -1
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));
typedef int8_t i8v __attribute__((vector_size(kLanes)));

// body(0), body(1), .. body(n - 1) in a row, each index a constant. An array of sums that is a step's
// state stays in registers only if nothing but constants ever indexes it; a loop that the compiler is
// to unroll may be unrolled too late for that.
template <class Body, int... i>
PF_INLINE void times_each(Body&& body, std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>{}), ...);
}

template <int n, class Body>
PF_INLINE void times(Body&& body) {
    times_each(body, std::make_integer_sequence<int, n>{});
}

// Of lambdas given to `times`.
#define PF_EACH __attribute__((always_inline))

// ---- lanes ---------------------------------------------------------------------------------------

// Lane j of the result is lane `Pick::of(j)` of a followed by b, whatever a lane is.
template <class Pick, class V, int... j>
PF_INLINE V pick(V a, V b, std::integer_sequence<int, j...>) {
    return __builtin_shufflevector(a, b, Pick::of(j)...);
}
template <class Pick, class V>
PF_INLINE V pick(V a, V b) {
    return pick<Pick>(a, b, std::make_integer_sequence<int, static_cast<int>(sizeof a / sizeof a[0])>{});
}
template <class Pick, class V>
PF_INLINE V pick(V v) {
    return pick<Pick>(v, v);
}

// Each lane with the one `distance` away, a power of two.
template <int distance>
struct Swapped {
    static constexpr int of(int j) { return j ^ distance; }
};

// ---- memory: no alignment is asked for -----------------------------------------------------------

template <class V, class T>
PF_INLINE V load_as(const T* from) {
    V out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

template <class V, class T>
PF_INLINE void store_as(T* to, V value) {
    std::memcpy(to, &value, sizeof value);
}

PF_INLINE f32v load(const float* from) { return load_as<f32v>(from); }
PF_INLINE void store(float* to, f32v value) { store_as(to, value); }

PF_INLINE f32v splat(float value) { return value - f32v{}; }

// The first `count` (0 <= count <= kLanes) lanes; the others are zero. Nothing past them is touched.
PF_INLINE f32v load_first(const float* from, int64_t count) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#endif
    f32v out{};
    std::memcpy(&out, from, sizeof(float) * static_cast<size_t>(count));
    return out;
}

PF_INLINE void store_first(float* to, f32v value, int64_t count) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16)
        return _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)value);
#endif
    std::memcpy(to, &value, sizeof(float) * static_cast<size_t>(count));
}

// Lane i of the result: lane which[i] of a followed by b; which[i] is below 2 * kLanes.
PF_INLINE f32v pick_lanes(f32v a, f32v b, i32v which) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16)
        return (f32v)_mm512_permutex2var_ps((__m512)a, (__m512i)which, (__m512)b);
#endif
    float both[2 * kLanes];
    store(both, a);
    store(both + kLanes, b);
    f32v out;
    for (int i = 0; i < kLanes; i++) out[i] = both[which[i]];
    return out;
}

inline constexpr int64_t kLineBytes = 64;  // of a cache
// Only as far as the second-level cache.
PF_INLINE void prefetch_near(const void* address) { __builtin_prefetch(address, 0, 2); }
// Into the first-level cache and, where the machine can do that, past all others: what passes only
// once drives nothing out of them.
PF_INLINE void prefetch_passing(const void* address) { __builtin_prefetch(address, 0, 0); }

// ---- arithmetic ----------------------------------------------------------------------------------

// a * b + c, rounded once where the machine has that instruction, twice where it has not (baseline).
PF_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__FMA__)
    typedef float half __attribute__((vector_size(32)));
    constexpr int kHalves = sizeof(f32v) / sizeof(half);
    half x[kHalves], y[kHalves], z[kHalves];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
    std::memcpy(z, &c, sizeof c);
    for (int i = 0; i < kHalves; i++)
        z[i] = (half)_mm256_fmadd_ps((__m256)x[i], (__m256)y[i], (__m256)z[i]);
    std::memcpy(&c, z, sizeof c);
    return c;
#elif defined(__aarch64__)
    return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// sum = fma(a, b, sum), in place. With AVX2 the sums of a register tile and their factors fill all
// registers; the compiler, free to choose among three forms of the instruction, moves sums about and
// keeps one in memory, which costs a third of the speed. This names the form that leaves them alone.
PF_INLINE void fma_into(f32v& sum, f32v a, f32v b) {
#if defined(__FMA__) && !defined(__AVX512F__)
    if constexpr (kLanes == 8) {
        asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
        return;
    }
#endif
    sum = fma(a, b, sum);
}

PF_INLINE f32v select(i32v mask, f32v yes, f32v no) { return mask ? yes : no; }

// As the machine's own: the second operand where either is NaN.
PF_INLINE f32v max(f32v a, f32v b) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#endif
    return select(a > b, a, b);
}
PF_INLINE f32v min(f32v a, f32v b) { return select(a < b, a, b); }

// Sum and maximum over the lanes, always by halves: lane i with lane i + width / 2.
template <int distance = kLanes / 2, class V>
PF_INLINE auto sum_lanes(V v) {
    if constexpr (distance == 0)
        return v[0];
    else
        return sum_lanes<distance / 2>(v + pick<Swapped<distance>>(v));
}

PF_INLINE float max_lanes(f32v value) {
    float lanes[kLanes];
    store(lanes, value);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// ---- bf16 ----------------------------------------------------------------------------------------

PF_INLINE float to_f32(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// To the nearest, ties to even; NaN stays NaN (quiet), infinity infinity.
PF_INLINE bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// GCC makes four instructions of what AVX2 and AVX-512 have one for.
PF_INLINE u32v widen(u16v value) {
#if defined(PF_LANES)
    return __builtin_convertvector(value, u32v);
#elif defined(__AVX512F__)
    return (u32v)_mm512_cvtepu16_epi32((__m256i)value);
#elif defined(__AVX2__)
    return (u32v)_mm256_cvtepu16_epi32((__m128i)value);
#else
    return __builtin_convertvector(value, u32v);
#endif
}

PF_INLINE f32v load(const bf16* from) { return (f32v)(widen(load_as<u16v>(from)) << 16); }

// As to_bf16, lane by lane.
PF_INLINE u16v to_bf16(f32v value) {
    const u32v bits = (u32v)value;
    const u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const u32v quiet = (bits >> 16) | 0x40;
    const i32v is_nan = value != value;
    return __builtin_convertvector((u32v)(is_nan ? (i32v)quiet : (i32v)rounded), u16v);
}

PF_INLINE void store(bf16* to, f32v value) { store_as(to, to_bf16(value)); }

PF_INLINE f32v load_first(const bf16* from, int64_t count) {
    u16v out{};
    std::memcpy(&out, from, sizeof(bf16) * static_cast<size_t>(count));
    return (f32v)(widen(out) << 16);
}

PF_INLINE void store_first(bf16* to, f32v value, int64_t count) {
    const u16v bits = to_bf16(value);
    std::memcpy(to, &bits, sizeof(bf16) * static_cast<size_t>(count));
}

// Lane i of `pairs` holds two bf16 values: the even one in the low half, the odd one in the high.
PF_INLINE f32v even_of(u32v pairs) { return (f32v)(pairs << 16); }
PF_INLINE f32v odd_of(u32v pairs) { return (f32v)(pairs & 0xffff0000u); }

// As odd_of where no register is left for the mask: it stays in memory.
alignas(4 * kLanes) inline constexpr u32v kOddMask = 0xffff0000u - u32v{};
PF_INLINE f32v odd_of_tile(u32v pairs) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (kLanes == 8) {
        asm("vpand %1, %0, %0" : "+x"(pairs) : "m"(kOddMask));
        return (f32v)pairs;
    }
#endif
    return odd_of(pairs);
}

// Lane k of the result: value k of `even` in the low half, value k of `odd` in the high one, of the
// first kLanes values of each; of the last.
typedef uint16_t halves __attribute__((vector_size(4 * kLanes)));

template <int first>
struct PairsFrom {
    static constexpr int of(int j) { return first + j / 2 + j % 2 * 2 * kLanes; }
};
PF_INLINE u32v pairs_of_low(u32v even, u32v odd) {
    return (u32v)pick<PairsFrom<0>>((halves)even, (halves)odd);
}
PF_INLINE u32v pairs_of_high(u32v even, u32v odd) {
    return (u32v)pick<PairsFrom<kLanes>>((halves)even, (halves)odd);
}

// As to_bf16, for lanes none of which is subnormal.
PF_INLINE u16v round_normal(f32v value) {
#if defined(__AVX512BF16__)
    return (u16v)_mm512_cvtneps_pbh((__m512)value);
#else
    return to_bf16(value);
#endif
}

// sum + odd * odd + even * even, in this order: what VDPBF16PS computes (save that it takes
// subnormal numbers as zero).
PF_INLINE f32v dot_pairs(u32v a, u32v b, f32v sum) {
#if defined(__AVX512BF16__)
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return fma(even_of(a), even_of(b), fma(odd_of(a), odd_of(b), sum));
#endif
}

// ---- int8 ----------------------------------------------------------------------------------------

// Whether the machine multiplies four pairs of bytes, by sixteen lanes. PF_PAIR_ROWS has the portable twin do
// it, for tests.
#if (defined(__AVX512VNNI__) && !defined(PF_LANES)) || defined(PF_PAIR_ROWS)
#define PF_QUADS
inline constexpr bool kHasQuads = true;
static_assert(kLanes == 16);
#else
inline constexpr bool kHasQuads = false;
#endif

// sum + the products of the four bytes of each lane, those of `a` unsigned, those of `b` signed.
PF_INLINE i32v dot_quads(u32v a, u32v b, i32v sum) {
#if defined(__AVX512VNNI__)
    return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    times<4>([&](auto byte) PF_EACH {
        sum += (i32v)(a << (24 - 8 * byte) >> 24) * ((i32v)(b << (24 - 8 * byte)) >> 24);
    });
    return sum;
#endif
}

PF_INLINE f32v load(const int8_t* from) {
    return __builtin_convertvector(__builtin_convertvector(load_as<i8v>(from), i32v), f32v);
}

// ---- functions -----------------------------------------------------------------------------------

// e to the power x within 2 units in the last place; 0 far below, infinity far above, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by Cephes' polynomial (Moshier, expf); the power of two
// goes in as two factors, so that results that are subnormal come out right.
PF_INLINE f32v exp(f32v x) {
    x = select(x > splat(89.0f), splat(89.0f), x);
    x = select(x < splat(-104.0f), splat(-104.0f), x);
    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32v shifted = fma(x, splat(1.44269504088896341f), magic);
    const f32v n = shifted - magic;
    f32v r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const i32v power = (i32v)shifted - (i32v)magic;
    const i32v first = power >> 1;
    const f32v scale_first = (f32v)((first + 127) << 23);
    const f32v scale_second = (f32v)((power - first + 127) << 23);
    return p * scale_first * scale_second;
}

// x / (1 + e^-x).
PF_INLINE f32v silu(f32v x) { return x / (exp(-x) + 1.0f); }

}  // namespace pf
