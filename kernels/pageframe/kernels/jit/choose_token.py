"""Choose one token per row of logits on the device: the sampler's definition, without a round trip.

    logits ─▶ best token ─▶ (top-k) ─▶ (top-p) ─▶ sum of what is kept ─▶ first token, by id, at
                                                                      which the running sum of
                                                                      weights is above u * sum

The definition is ``executor/model/draw.py``'s: weights are whole numbers, so that sums do not
depend on their order; filters are thresholds, so that ties are kept or dropped together; and one
uniform number per (seed, sample index, position), from Philox, decides. Tokens equal those of the
PyTorch sampler except where the two exponentials round a weight differently right at a border.

A threshold is found without sorting. Logits are mapped to integers that compare as they do, and
the search halves an interval of integers: one pass over the row sums what is at least the middle,
and also finds the nearest integers in the row on both sides of it, where the search goes on. So it
ends as soon as one number of the row is left, after about as many passes as the logarithm of the
numbers that are close to the threshold. FlashInfer's sampling kernels search alike, by pivots.

Budget: a greedy row reads V logits once. A draw reads them twice more, a filter once per halving
(10 to 20, from second-level cache: 0.5 MB for V = 128,256). About 6 operations per number and pass,
30 where weights are summed; bound by computing in one SM per row.
"""

import triton
import triton.language as tl

# Weight of the best token; as in executor/model/draw.py.
WEIGHT_ONE: tl.constexpr = tl.constexpr(float(1 << 40))
KEY_MIN: tl.constexpr = tl.constexpr(-(1 << 31))
KEY_MAX: tl.constexpr = tl.constexpr((1 << 31) - 1)
# The key of infinity; keys from here on are not finite.
KEY_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)

# Constants of every launch; the compile gate compiles with the same.
TILE = 4096
NUM_WARPS = 16


@triton.jit
def keys_of(values):
    """Integers that compare as float32 numbers do, equal for both zeros; a NaN is the highest."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values != values, KEY_MAX, keys)


@triton.jit
def value_of(key):
    """The float32 number of a key."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def shares_of(values, best, temperature):
    """Weights as float32 in [0, 1]: 1 for the best value."""
    return tl.exp(tl.math.div_rn(values - best, tl.zeros_like(values) + temperature))


@triton.jit
def whole(shares):
    """Weights as whole numbers, int64."""
    return (shares * WEIGHT_ONE).to(tl.int64)


@triton.jit
def load_tile(row, tile, vocab_size, TILE: tl.constexpr):
    """Ids and values of a tile; minus infinity past the end, which weighs nothing."""
    ids = tile * TILE + tl.arange(0, TILE)
    values = tl.load(row + ids, mask=ids < vocab_size, other=-float("inf"))
    return ids, values


@triton.jit
def find_best(row, vocab_size, TILE: tl.constexpr):
    """The highest key of a row and the lowest id that has it."""
    highest = tl.full((TILE,), KEY_MIN, tl.int32)
    holders = tl.zeros((TILE,), tl.int32)
    for tile in tl.range(0, tl.cdiv(vocab_size, TILE)):
        ids, values = load_tile(row, tile, vocab_size, TILE)
        keys = keys_of(values)
        is_higher = keys > highest
        highest = tl.where(is_higher, keys, highest)
        holders = tl.where(is_higher, ids, holders)
    best = tl.max(highest, 0)
    return best, tl.min(tl.where(highest == best, holders, KEY_MAX), 0)


@triton.jit
def find_threshold(
    row,
    vocab_size,
    best_key,
    best,
    temperature,
    kept_from,
    top_k,
    top_p,
    total,
    IS_BY_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The highest key of the row such that what is at least as high suffices.

    By weight: weights of keys from ``kept_from`` on reach ``top_p`` of ``total``. Else: ``top_k``
    numbers are at least as high. The threshold stays in [low, high], both ends in the row.
    """
    low = kept_from.to(tl.int64)
    high = best_key.to(tl.int64)
    while low < high:
        # Above ``low``: each turn leaves out one number of the row at least.
        middle = low + (high - low + 1) // 2
        border = middle.to(tl.int32)
        sums = tl.zeros((TILE,), tl.int64)
        above = tl.full((TILE,), KEY_MAX, tl.int32)
        below = tl.full((TILE,), KEY_MIN, tl.int32)
        for tile in tl.range(0, tl.cdiv(vocab_size, TILE)):
            ids, values = load_tile(row, tile, vocab_size, TILE)
            # Past the end lies nothing, not even minus infinity: top-k may ask for that.
            keys = tl.where(ids < vocab_size, keys_of(values), KEY_MIN)
            is_counted = keys >= border
            if IS_BY_WEIGHT:
                weights = whole(shares_of(values, best, temperature))
                sums += tl.where(is_counted, weights, 0)
            else:
                sums += is_counted.to(tl.int64)
            above = tl.minimum(above, tl.where(is_counted, keys, KEY_MAX))
            below = tl.maximum(below, tl.where(is_counted, KEY_MIN, keys))
        reached = tl.sum(sums, 0)
        if IS_BY_WEIGHT:
            suffices = reached.to(tl.float64) >= top_p * total.to(tl.float64)
        else:
            suffices = reached >= top_k
        low = tl.where(suffices, tl.min(above, 0).to(tl.int64), low)
        high = tl.where(suffices, high, tl.maximum(tl.max(below, 0).to(tl.int64), low))
    return low.to(tl.int32)


@triton.jit
def kept_weights(values, best, temperature, kept_from, min_p):
    """Whole weights, zero for what a filter drops."""
    shares = shares_of(values, best, temperature)
    is_kept = (keys_of(values) >= kept_from) & (shares >= min_p)
    return tl.where(is_kept, whole(shares), 0)


@triton.jit
def sum_weights(row, vocab_size, best, temperature, kept_from, min_p, TILE: tl.constexpr):
    """Sum of the kept weights of a row, int64."""
    sums = tl.zeros((TILE,), tl.int64)
    for tile in tl.range(0, tl.cdiv(vocab_size, TILE)):
        _, values = load_tile(row, tile, vocab_size, TILE)
        sums += kept_weights(values, best, temperature, kept_from, min_p)
    return tl.sum(sums, 0)


@triton.jit
def pick(row, vocab_size, best, temperature, kept_from, min_p, target, TILE: tl.constexpr):
    """The first id at which the running sum of kept weights is above ``target``."""
    token = tl.full((), -1, tl.int32)
    running = tl.zeros((), tl.int64)
    for tile in tl.range(0, tl.cdiv(vocab_size, TILE)):
        if running <= target:
            ids, values = load_tile(row, tile, vocab_size, TILE)
            weights = kept_weights(values, best, temperature, kept_from, min_p)
            sums = running + tl.cumsum(weights, 0)
            running += tl.sum(weights, 0)
            if running > target:
                token = tl.min(tl.where(sums > target, ids, KEY_MAX), 0)
    return token


@triton.jit
def uniform(seed, sample_index, position):
    """The number in [0, 1) of a token; see executor/model/philox.py for key and counter."""
    high, low, _, _ = tl.philox(
        seed, position.to(tl.uint32), sample_index.to(tl.uint32), 0, 0, n_rounds=10
    )
    bits = ((high >> 5).to(tl.int64) << 26) | (low >> 6).to(tl.int64)
    # 27 + 26 bits: all that a float64 holds between 0 and 1.
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def choose_token(
    logits,
    tokens,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    sample_indices,
    positions,
    logits_stride,
    vocab_size,
    TILE: tl.constexpr,
):
    """One row: the token, or -1 where the best logit is no finite number.

    Args:
        logits: float32 [K, vocab_size].
        tokens: int32 [K], written.
        temperatures: float32 [K]; zero for the best token.
        top_ks: int32 [K], in [1, vocab_size]; ``vocab_size`` keeps all.
        top_ps: float64 [K], in (0, 1]; 1 keeps all.
        min_ps: float32 [K], in [0, 1].
        seeds: int64 [K], the bits of 64-bit seeds.
        sample_indices: int64 [K].
        positions: int64 [K], the position that each new token will take.
        logits_stride: From a row to the next, in elements.
        vocab_size: Numbers per row.
        TILE: Numbers per pass and step, a power of two.

    Grid: (K,).
    """
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * logits_stride
    temperature = tl.load(temperatures + index)
    best_key, token = find_best(row, vocab_size, TILE)
    is_finite = (best_key < KEY_INFINITY) & (best_key > ~KEY_INFINITY)
    if (temperature > 0.0) & is_finite:
        best = value_of(best_key)
        top_k = tl.load(top_ks + index)
        top_p = tl.load(top_ps + index)
        kept_from = tl.full((), KEY_MIN, tl.int32)
        if top_k < vocab_size:
            kept_from = find_threshold(
                row, vocab_size, best_key, best, temperature, kept_from, top_k, top_p,
                tl.zeros((), tl.int64), False, TILE,
            )  # fmt: skip
        if top_p < 1.0:
            # Top-p works on what top-k left, as if that were the whole distribution.
            total = sum_weights(row, vocab_size, best, temperature, kept_from, 0.0, TILE)
            kept_from = find_threshold(
                row, vocab_size, best_key, best, temperature, kept_from, top_k, top_p,
                total, True, TILE,
            )  # fmt: skip
        min_p = tl.load(min_ps + index)
        total = sum_weights(row, vocab_size, best, temperature, kept_from, min_p, TILE)
        number = uniform(
            tl.load(seeds + index), tl.load(sample_indices + index), tl.load(positions + index)
        )
        target = (number * total.to(tl.float64)).to(tl.int64)
        token = pick(row, vocab_size, best, temperature, kept_from, min_p, target, TILE)
    tl.store(tokens + index, tl.where(is_finite, token, -1))
