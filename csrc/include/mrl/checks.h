// What the ops demand of their tensors, and numbers for messages.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

#include "mrl/tile.h"
#include "mrl/tiles_cpu.h"

namespace mrl {

// Numbers go into messages as text. Where the compiler links libstdc++ statically into the extension (seen on a GPU
// host), writing a number to a stream, as TORCH_CHECK would, crashed in place of raising; writing text did not.
inline std::string text(int64_t number) { return std::to_string(number); }

inline std::string text(at::IntArrayRef numbers) {
  std::string result = "[";
  for (const int64_t number : numbers) result += (result.size() > 1 ? ", " : "") + text(number);
  return result + "]";
}

inline void check_table(const at::Tensor& table, const char* name, const char* rows, int64_t fields) {
  TORCH_CHECK(table.dim() == 2 && table.size(1) == fields && table.scalar_type() == at::kLong && table.is_contiguous(),
              name, " ", text(table.sizes()), " ", c10::toString(table.scalar_type()), " with strides ",
              text(table.strides()), " must be contiguous int64 [", rows, ", ", text(fields), "]");
}

// The operations of a table on the CPU; raises where one is no strided copy or fill.
inline const Descriptor* operations_of(const at::Tensor& descriptors) {
  check_table(descriptors, "descriptors", "num_ops", Descriptor::kFields);
  TORCH_CHECK(descriptors.device().is_cpu(), "descriptors on ", descriptors.device(),
              " must be on cpu, where they are read");
  const auto* ops = reinterpret_cast<const Descriptor*>(descriptors.const_data_ptr<int64_t>());
  const std::string error = cpu::find_error(ops, descriptors.size(0));
  TORCH_CHECK(error.empty(), error);
  return ops;
}

// The same, where none may be a fill.
inline const Descriptor* copies_of(const at::Tensor& descriptors) {
  const Descriptor* ops = operations_of(descriptors);
  for (int64_t i = 0; i < descriptors.size(0); ++i) {
    TORCH_CHECK(ops[i].src != 0, "operation ", text(i), " is a fill; copy engines only copy, give it to build_tiles");
  }
  return ops;
}

inline void check_tiles(const at::Tensor& anchor, const at::Tensor& tiles) {
  check_table(tiles, "tiles", "num_tiles", kTileFields);
  TORCH_CHECK(anchor.device() == tiles.device(), "anchor on ", anchor.device(), " and tiles on ", tiles.device(),
              " must be on one device: that of the destination");
  TORCH_CHECK(tiles.size(0) < int64_t{1} << 31, text(tiles.size(0)),
              " tiles are too many for one launch; use larger tiles");
}

inline const Tile* tiles_of(const at::Tensor& tiles) {
  return reinterpret_cast<const Tile*>(tiles.const_data_ptr<int64_t>());
}

}  // namespace mrl
