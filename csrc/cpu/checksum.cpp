#include "mrl/checksum.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "mrl/tiles_cpu.h"

namespace mrl::cpu {
namespace {

uint64_t sum_run(const char* bytes, int64_t num_bytes, uint64_t position) {
  uint64_t sum = 0;
  while (num_bytes > 0) {
    const int64_t count = std::min<int64_t>(num_bytes, 8 - static_cast<int64_t>(position % 8));
    uint64_t value = 0;
    std::memcpy(&value, bytes, static_cast<std::size_t>(count));
    sum += weighted(value, position);
    bytes += count;
    position += static_cast<uint64_t>(count);
    num_bytes -= count;
  }
  return sum;
}

}  // namespace

uint64_t checksum_tiles(const Tile* tiles, int64_t num_tiles, bool of_source) {
  uint64_t sum = 0;
  for (const Tile* tile = tiles; tile < tiles + num_tiles; ++tile) {
    if (of_source && tile->src == 0) continue;
    const int64_t base = of_source ? tile->src : tile->dst;
    const int64_t pitch = of_source ? tile->src_pitch : tile->dst_pitch;
    for (int64_t row = 0; row < tile->rows; ++row) {
      const auto* bytes = reinterpret_cast<const char*>(base + row * pitch);
      sum += sum_run(bytes, tile->row_bytes, static_cast<uint64_t>(tile->position + row * tile->row_bytes));
    }
  }
  return sum;
}

}  // namespace mrl::cpu
