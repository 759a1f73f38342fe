// Raw CUDA IPC: whole allocations, opened in the context of the importer's own device.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mrl::cuda {

// Handle of the allocation under `memory` [64] uint8, and the byte of the allocation at which `memory` starts.
std::tuple<at::Tensor, int64_t> ipc_export(const at::Tensor& memory);

// Address, valid on `device`, of the allocation's first byte.
int64_t ipc_open(const at::Tensor& handle, at::Device device);

void ipc_close(int64_t pointer, at::Device device);

}  // namespace mrl::cuda
