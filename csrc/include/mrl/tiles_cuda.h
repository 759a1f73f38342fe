// CUDA launchers over tiles in device memory, and copies by copy engines; no torch. One source file per function in cuda/.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "mrl/tile.h"

namespace mrl::cuda {

// Copies all tiles in one launch on `stream`. Sources may be peer or IPC pointers mapped on the current device.
// `cursor` is a zeroed word in device memory, used up by the launch. If `sum` is not null, the checksum of the bytes
// read is added to it.
cudaError_t copy_tiles(const Tile* tiles, int64_t num_tiles, uint32_t* cursor, uint64_t* sum, cudaStream_t stream);

// Adds the checksum of the tiles' source or destination bytes to `sum`.
cudaError_t checksum_tiles(const Tile* tiles, int64_t num_tiles, bool of_source, uint32_t* cursor, uint64_t* sum,
                           cudaStream_t stream);

// Puts one copy for each operation into `stream`, in order; `ops` lies in host memory and all have a source. Copies
// between devices are done by the copy engines.
cudaError_t copy_with_engines(const Descriptor* ops, int64_t num_ops, cudaStream_t stream);

}  // namespace mrl::cuda
