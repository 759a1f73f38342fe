// What the ops demand of their tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "mrl/tile.h"

namespace mrl {

inline void check_table(const at::Tensor& table, const char* name, const char* rows, int64_t fields) {
  TORCH_CHECK(table.dim() == 2 && table.size(1) == fields && table.scalar_type() == at::kLong && table.is_contiguous(),
              name, " ", table.sizes(), " ", table.scalar_type(), " with strides ", table.strides(),
              " must be contiguous int64 [", rows, ", ", fields, "]");
}

inline void check_tiles(const at::Tensor& anchor, const at::Tensor& tiles) {
  check_table(tiles, "tiles", "num_tiles", kTileFields);
  TORCH_CHECK(anchor.device() == tiles.device(), "anchor on ", anchor.device(), " and tiles on ", tiles.device(),
              " must be on one device: that of the destination");
  TORCH_CHECK(tiles.size(0) < int64_t{1} << 31, tiles.size(0), " tiles are too many for one launch; use larger tiles");
}

inline const Tile* tiles_of(const at::Tensor& tiles) {
  return reinterpret_cast<const Tile*>(tiles.const_data_ptr<int64_t>());
}

}  // namespace mrl
