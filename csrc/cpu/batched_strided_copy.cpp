#include <cstddef>
#include <cstring>

#include "mrl/tiles_cpu.h"

namespace mrl::cpu {

void copy_tiles(const Tile* tiles, int64_t num_tiles) {
  for (const Tile* tile = tiles; tile < tiles + num_tiles; ++tile) {
    const auto num_bytes = static_cast<std::size_t>(tile->row_bytes);
    for (int64_t row = 0; row < tile->rows; ++row) {
      void* dst = reinterpret_cast<void*>(tile->dst + row * tile->dst_pitch);
      if (tile->src == 0) {
        std::memset(dst, 0, num_bytes);
      } else {
        std::memcpy(dst, reinterpret_cast<const void*>(tile->src + row * tile->src_pitch), num_bytes);
      }
    }
  }
}

}  // namespace mrl::cpu
