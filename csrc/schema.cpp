// Schemas of all ops and their CPU implementations. Shapes for tracing: mrl/ops/fake.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <optional>

#include "mrl/checks.h"
#include "mrl/tiles_cpu.h"

namespace mrl {
namespace {

constexpr int64_t kTilesPerThread = 16;

at::Tensor build_tiles(const at::Tensor& descriptors, int64_t tile_bytes, const std::optional<at::Tensor>& sources) {
  const Descriptor* ops = operations_of(descriptors);
  TORCH_CHECK(tile_bytes >= kMinTileBytes && tile_bytes <= kMaxTileBytes && tile_bytes % kMinTileBytes == 0,
              "tile_bytes = ", text(tile_bytes), " must be a multiple of ", text(kMinTileBytes), " of at most ",
              text(kMaxTileBytes));
  if (sources) {
    TORCH_CHECK(sources->device().is_cpu() && sources->scalar_type() == at::kLong && sources->is_contiguous() &&
                    sources->dim() == 1 && sources->size(0) == descriptors.size(0),
                "sources ", text(sources->sizes()), " ", c10::toString(sources->scalar_type()), " on ",
                sources->device().str(), " must be contiguous int64 [", text(descriptors.size(0)),
                "] on cpu: one source for each operation");
  }
  const int64_t* source = sources ? sources->const_data_ptr<int64_t>() : nullptr;
  const auto tiles = cpu::build_tiles(ops, descriptors.size(0), source, tile_bytes);
  at::Tensor result = at::empty({static_cast<int64_t>(tiles.size()), kTileFields}, at::kLong);
  if (!tiles.empty()) std::memcpy(result.mutable_data_ptr<int64_t>(), tiles.data(), tiles.size() * sizeof(Tile));
  return result;
}

template <typename Loop>
void for_tiles(const at::Tensor& tiles, Loop loop) {
  const Tile* first = tiles_of(tiles);
  at::parallel_for(0, tiles.size(0), kTilesPerThread,
                   [&](int64_t begin, int64_t end) { loop(first + begin, end - begin); });
}

at::Tensor as_int64(uint64_t sum) {
  at::Tensor result = at::empty({1}, at::kLong);
  *result.mutable_data_ptr<int64_t>() = static_cast<int64_t>(sum);
  return result;
}

void batched_strided_copy(const at::Tensor& anchor, const at::Tensor& tiles) {
  check_tiles(anchor, tiles);
  for_tiles(tiles, cpu::copy_tiles);
}

at::Tensor batched_strided_copy_checksum(const at::Tensor& anchor, const at::Tensor& tiles) {
  check_tiles(anchor, tiles);
  std::atomic<uint64_t> sum{0};
  for_tiles(tiles, [&](const Tile* part, int64_t count) {
    // Tile by tile: a tile is still in the cache when it is summed.
    for (int64_t i = 0; i < count; ++i) {
      cpu::copy_tiles(part + i, 1);
      sum += cpu::checksum_tiles(part + i, 1, true);
    }
  });
  return as_int64(sum);
}

at::Tensor checksum(const at::Tensor& tiles, bool of_source) {
  check_tiles(tiles, tiles);
  std::atomic<uint64_t> sum{0};
  for_tiles(tiles, [&](const Tile* part, int64_t count) { sum += cpu::checksum_tiles(part, count, of_source); });
  return as_int64(sum);
}

void copy_engine_copy(const at::Tensor& anchor, const at::Tensor& descriptors) {
  cpu::copy_operations(copies_of(descriptors), descriptors.size(0));
}

at::Tensor tensor_from_ptr(int64_t pointer, int64_t num_bytes, at::Device device) {
  TORCH_CHECK(pointer > 0 && num_bytes > 0, "there is no memory of ", text(num_bytes), " bytes at address ",
              text(pointer));
  // The target device is given, not asked of the pointer: a peer's memory counts as memory of the device that reads it.
  return at::for_blob(reinterpret_cast<void*>(pointer), {num_bytes})
      .options(at::TensorOptions(at::kByte).device(device))
      .target_device(device)
      .make_tensor();
}

}  // namespace

TORCH_LIBRARY(mrl, library) {
  library.def("build_tiles(Tensor descriptors, int tile_bytes, Tensor? sources=None) -> Tensor");
  library.def("batched_strided_copy_(Tensor(a!) anchor, Tensor tiles) -> ()");
  library.def("batched_strided_copy_checksum_(Tensor(a!) anchor, Tensor tiles) -> Tensor");
  library.def("checksum(Tensor tiles, bool of_source) -> Tensor");
  library.def("copy_engine_copy_(Tensor(a!) anchor, Tensor descriptors) -> ()");
  library.def("tensor_from_ptr(int pointer, int num_bytes, Device device) -> Tensor");
  library.def("ipc_export(Tensor memory) -> (Tensor, int)");
  library.def("ipc_open(Tensor handle, Device device) -> int");
  library.def("ipc_close(int pointer, Device device) -> ()");
}

TORCH_LIBRARY_IMPL(mrl, CPU, library) {
  library.impl("batched_strided_copy_", batched_strided_copy);
  library.impl("batched_strided_copy_checksum_", batched_strided_copy_checksum);
  library.impl("checksum", checksum);
  library.impl("copy_engine_copy_", copy_engine_copy);
}

TORCH_LIBRARY_IMPL(mrl, CompositeExplicitAutograd, library) {
  library.impl("build_tiles", build_tiles);
  library.impl("tensor_from_ptr", tensor_from_ptr);
}

}  // namespace mrl
