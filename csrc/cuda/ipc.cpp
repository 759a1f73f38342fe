#include "mrl/ipc.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "mrl/checks.h"

namespace mrl::cuda {
namespace {

constexpr int64_t kHandleBytes = sizeof(cudaIpcMemHandle_t);

// First byte of the allocation that holds `pointer`. libcuda is not linked: a host without a driver can load this.
CUdeviceptr allocation_base(CUdeviceptr pointer) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  C10_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &function, 12000, cudaEnableDefault, &found));
  TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuMemGetAddressRange");
  CUdeviceptr base = 0;
  std::size_t size = 0;
  const auto error = reinterpret_cast<CUresult (*)(CUdeviceptr*, std::size_t*, CUdeviceptr)>(function)(
      &base, &size, pointer);
  TORCH_CHECK(error == CUDA_SUCCESS, "cuMemGetAddressRange failed with CUDA driver error ", text(error));
  return base;
}

// `device` with an index: "cuda" alone means the current one.
at::Device checked_device(at::Device device) {
  TORCH_CHECK(device.is_cuda(), "device ", device, " must be a CUDA device");
  return device.has_index() ? device : at::Device(at::kCUDA, c10::cuda::current_device());
}

}  // namespace

std::tuple<at::Tensor, int64_t> ipc_export(const at::Tensor& memory) {
  const auto nbytes = static_cast<int64_t>(memory.nbytes());
  TORCH_CHECK(memory.is_cuda() && nbytes > 0, "memory of ", text(nbytes), " bytes on ", memory.device(),
              " must be at least one byte on a CUDA device");
  const c10::cuda::CUDAGuard guard(memory.device());
  const auto pointer = reinterpret_cast<CUdeviceptr>(memory.const_data_ptr());
  const CUdeviceptr base = allocation_base(pointer);
  cudaIpcMemHandle_t handle;
  const cudaError_t error = cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(base));
  if (error != cudaSuccess) {
    cudaGetLastError();
    TORCH_CHECK(false, "cannot export ", text(nbytes), " bytes on ", memory.device(), " to other processes: ",
                cudaGetErrorString(error),
                ". CUDA IPC handles exist for cudaMalloc memory only, not for mapped (VMM) memory: allocate trainer "
                "parameters with expandable_segments:False in PYTORCH_CUDA_ALLOC_CONF, outside torch_memory_saver "
                "regions and outside NCCL user buffers");
  }
  at::Tensor bytes = at::empty({kHandleBytes}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr<uint8_t>(), &handle, kHandleBytes);
  return {bytes, static_cast<int64_t>(pointer - base)};
}

int64_t ipc_open(const at::Tensor& handle, at::Device device) {
  TORCH_CHECK(handle.device().is_cpu() && handle.scalar_type() == at::kByte && handle.is_contiguous() &&
                  handle.dim() == 1 && handle.size(0) == kHandleBytes,
              "handle ", text(handle.sizes()), " ", c10::toString(handle.scalar_type()), " on ", handle.device(),
              " must be contiguous uint8 [", text(kHandleBytes), "] on cpu, as ipc_export returns it");
  const at::Device own = checked_device(device);
  const c10::cuda::CUDAGuard guard(own);
  cudaIpcMemHandle_t raw;
  std::memcpy(&raw, handle.const_data_ptr<uint8_t>(), kHandleBytes);
  void* pointer = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&pointer, raw, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) {
    cudaGetLastError();
    TORCH_CHECK(false, "cannot open exported memory on ", own, ": ", cudaGetErrorString(error),
                ". The exporting process must be alive and another one than this, and its GPU must be a peer of ", own,
                " (nvidia-smi topo -p2p r)");
  }
  return reinterpret_cast<int64_t>(pointer);
}

void ipc_close(int64_t pointer, at::Device device) {
  const c10::cuda::CUDAGuard guard(checked_device(device));
  C10_CUDA_CHECK(cudaIpcCloseMemHandle(reinterpret_cast<void*>(pointer)));
}

}  // namespace mrl::cuda
