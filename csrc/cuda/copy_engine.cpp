#include <cstddef>

#include "mrl/tiles_cuda.h"

namespace mrl::cuda {

cudaError_t copy_with_engines(const Descriptor* ops, int64_t num_ops, cudaStream_t stream) {
  for (const Descriptor* op = ops; op < ops + num_ops; ++op) {
    const auto* src = reinterpret_cast<const void*>(op->src);
    auto* dst = reinterpret_cast<void*>(op->dst);
    const auto row_bytes = static_cast<std::size_t>(op->row_bytes);
    const auto rows = static_cast<std::size_t>(op->rows);
    const cudaError_t error =
        op->is_one_run() ? cudaMemcpyAsync(dst, src, rows * row_bytes, cudaMemcpyDeviceToDevice, stream)
                         : cudaMemcpy2DAsync(dst, static_cast<std::size_t>(op->dst_pitch), src,
                                             static_cast<std::size_t>(op->src_pitch), row_bytes, rows,
                                             cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace mrl::cuda
