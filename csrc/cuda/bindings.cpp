// CUDA implementations of the ops of schema.cpp: checks, the current stream, a zeroed cursor, the launch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "mrl/checks.h"
#include "mrl/ipc.h"
#include "mrl/tiles_cuda.h"

namespace mrl {
namespace {

// [cursor of the launch; sum]
at::Tensor zeroed_state(const at::Tensor& tiles) { return at::zeros({2}, tiles.options()); }

uint32_t* cursor_of(const at::Tensor& state) {
  return reinterpret_cast<uint32_t*>(state.mutable_data_ptr<int64_t>());
}

uint64_t* sum_of(const at::Tensor& state) {
  return reinterpret_cast<uint64_t*>(state.mutable_data_ptr<int64_t>()) + 1;
}

at::Tensor copy(const at::Tensor& anchor, const at::Tensor& tiles, bool with_checksum) {
  check_tiles(anchor, tiles);
  const c10::cuda::CUDAGuard guard(tiles.device());
  const at::Tensor state = zeroed_state(tiles);
  uint64_t* sum = with_checksum ? sum_of(state) : nullptr;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cuda::copy_tiles(tiles_of(tiles), tiles.size(0), cursor_of(state), sum, stream));
  return state.narrow(0, 1, 1);
}

void batched_strided_copy(const at::Tensor& anchor, const at::Tensor& tiles) { copy(anchor, tiles, false); }

at::Tensor batched_strided_copy_checksum(const at::Tensor& anchor, const at::Tensor& tiles) {
  return copy(anchor, tiles, true);
}

at::Tensor checksum(const at::Tensor& tiles, bool of_source) {
  check_tiles(tiles, tiles);
  const c10::cuda::CUDAGuard guard(tiles.device());
  const at::Tensor state = zeroed_state(tiles);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(
      cuda::checksum_tiles(tiles_of(tiles), tiles.size(0), of_source, cursor_of(state), sum_of(state), stream));
  return state.narrow(0, 1, 1);
}

void copy_engine_copy(const at::Tensor& anchor, const at::Tensor& descriptors) {
  const Descriptor* ops = copies_of(descriptors);
  const c10::cuda::CUDAGuard guard(anchor.device());
  C10_CUDA_CHECK(cuda::copy_with_engines(ops, descriptors.size(0), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(mrl, CUDA, library) {
  library.impl("batched_strided_copy_", batched_strided_copy);
  library.impl("batched_strided_copy_checksum_", batched_strided_copy_checksum);
  library.impl("checksum", checksum);
  library.impl("copy_engine_copy_", copy_engine_copy);
}

TORCH_LIBRARY_IMPL(mrl, CompositeExplicitAutograd, library) {
  library.impl("ipc_export", cuda::ipc_export);
  library.impl("ipc_open", cuda::ipc_open);
  library.impl("ipc_close", cuda::ipc_close);
}

}  // namespace mrl
