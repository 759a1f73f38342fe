#include <type_traits>

#include "mrl/tiles_cuda.h"
#include "tile_stream.cuh"

namespace mrl::cuda {
namespace {

// Measured on an H100, as the absence of cache hints: docs/csrc.md.
constexpr int kThreads = 512;
constexpr int kUnroll = 4;

template <bool kChecksum, typename Word>
__device__ __forceinline__ void copy_tile(const Tile& tile, uint64_t& sum) {
  const AccessGrid<Word> grid(tile);
  const int64_t src_pitch = tile.src_pitch;
  const int64_t dst_pitch = tile.dst_pitch;
  const char* src = reinterpret_cast<const char*>(tile.src);
  char* dst = reinterpret_cast<char*>(tile.dst);
  for (uint32_t first = threadIdx.x; first < grid.count(); first += kThreads * kUnroll) {
    Word words[kUnroll] = {};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t access = first + i * kThreads;
      if (src && access < grid.count()) {
        words[i] = *reinterpret_cast<const Word*>(src + grid.offset(access, src_pitch));
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t access = first + i * kThreads;
      if (access < grid.count()) *reinterpret_cast<Word*>(dst + grid.offset(access, dst_pitch)) = words[i];
      if (kChecksum) sum += weighted_word(words[i], static_cast<uint64_t>(tile.position) + access * sizeof(Word));
    }
  }
}

template <bool kChecksum>
__global__ void __launch_bounds__(kThreads) copy_kernel(const Tile* tiles, uint32_t num_tiles, uint32_t* cursor,
                                                        uint64_t* total) {
  __shared__ TileStream::Shared shared;
  TileStream stream(shared, tiles, num_tiles, cursor);
  uint64_t sum = 0;
  while (const Tile* tile = stream.next()) {
    with_access_type(*tile, [&](auto* type) {
      copy_tile<kChecksum, std::remove_pointer_t<decltype(type)>>(*tile, sum);
    });
  }
  if (kChecksum) add_block_sum(sum, total);
}

template <bool kChecksum>
cudaError_t launch(const Tile* tiles, int64_t num_tiles, uint32_t* cursor, uint64_t* sum, cudaStream_t stream) {
  int blocks = 0;
  if (auto error = resident_blocks(copy_kernel<kChecksum>, kThreads, num_tiles, blocks)) return error;
  copy_kernel<kChecksum><<<blocks, kThreads, 0, stream>>>(tiles, static_cast<uint32_t>(num_tiles), cursor, sum);
  return cudaGetLastError();
}

}  // namespace

cudaError_t copy_tiles(const Tile* tiles, int64_t num_tiles, uint32_t* cursor, uint64_t* sum, cudaStream_t stream) {
  if (num_tiles == 0) return cudaSuccess;
  return sum ? launch<true>(tiles, num_tiles, cursor, sum, stream)
             : launch<false>(tiles, num_tiles, cursor, sum, stream);
}

}  // namespace mrl::cuda
