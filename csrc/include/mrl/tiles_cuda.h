// CUDA launchers over tiles in device memory; no torch. One source file per function in cuda/.
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

}  // namespace mrl::cuda
