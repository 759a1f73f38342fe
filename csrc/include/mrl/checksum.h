// The plan's checksum: sum over 8-byte words w_i at word position i of w_i * multiplier(i), modulo 2^64.
//
// A sum does not depend on the order of tiles or threads. It is linear in the bytes, so any access width gives the same
// result and a zero fill adds nothing. Multipliers are odd: one changed word always changes the sum; words or tiles
// that changed places change it unless they are equal, up to a chance of about 2^-63.
#pragma once

#include <cstdint>

#include "mrl/tile.h"

namespace mrl {

MRL_HOST_DEVICE uint64_t multiplier(uint64_t word_position) {
  uint64_t mixed = (word_position + 1) * 0x9E3779B97F4A7C15ull;
  mixed ^= mixed >> 32;
  return (mixed * 0xD6E8FEB86659FD93ull) | 1;
}

// What `value`, of at most 8 bytes that lie in one word, adds to the sum. Little endian.
MRL_HOST_DEVICE uint64_t weighted(uint64_t value, uint64_t position) {
  return (value << (8 * (position % 8))) * multiplier(position / 8);
}

}  // namespace mrl
