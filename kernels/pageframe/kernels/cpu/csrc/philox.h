// Philox4x32-10, as executor/model/philox.py has it: a random number for a seed, a sample and a
// position. After Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

namespace pf {

// In [0, 1), a multiple of 2^-53.
inline double philox_uniform(uint64_t seed, uint32_t sample_index, uint32_t position) {
    uint32_t counter[4] = {position, sample_index, 0, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const uint64_t first = uint64_t{0xD2511F53} * counter[0];
        const uint64_t second = uint64_t{0xCD9E8D57} * counter[2];
        counter[0] = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0];
        counter[2] = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1];
        counter[1] = static_cast<uint32_t>(second);
        counter[3] = static_cast<uint32_t>(first);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    const uint64_t bits = uint64_t{counter[0] >> 5} << 26 | counter[1] >> 6;
    return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace pf
