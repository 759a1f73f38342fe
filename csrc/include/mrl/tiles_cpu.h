// CPU loops over tiles; plain C++, no torch. One source file per function in cpu/.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mrl/tile.h"

namespace mrl::cpu {

// Cuts operations into tiles of about `tile_bytes` and interleaves those of different sources so that all sources run
// dry together. `sources` names the source of each operation; null: all the same.
std::vector<Tile> build_tiles(const Descriptor* ops, int64_t num_ops, const int64_t* sources, int64_t tile_bytes);

// Empty, or what is wrong with the first operation that is not a strided copy or fill.
std::string find_error(const Descriptor* ops, int64_t num_ops);

// Copies operations that all have a source, one after the other.
void copy_operations(const Descriptor* ops, int64_t num_ops);

void copy_tiles(const Tile* tiles, int64_t num_tiles);

// Sum over what lies at the source or at the destination of the tiles; see checksum.h.
uint64_t checksum_tiles(const Tile* tiles, int64_t num_tiles, bool of_source);

}  // namespace mrl::cpu
