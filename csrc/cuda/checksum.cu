#include "mrl/checksum.h"

#include <type_traits>

#include "mrl/tiles_cuda.h"
#include "tile_stream.cuh"

namespace mrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;

template <typename Word>
__device__ __forceinline__ uint64_t sum_tile(const Tile& tile, bool of_source) {
  const AccessGrid<Word> grid(tile);
  const char* memory = reinterpret_cast<const char*>(of_source ? tile.src : tile.dst);
  const int64_t pitch = of_source ? tile.src_pitch : tile.dst_pitch;
  uint64_t sum = 0;
  for (uint32_t first = threadIdx.x; first < grid.count(); first += kThreads * kUnroll) {
    Word words[kUnroll] = {};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t access = first + i * kThreads;
      if (memory && access < grid.count()) {
        words[i] = __ldcs(reinterpret_cast<const Word*>(memory + grid.offset(access, pitch)));
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      sum += weighted_word(words[i], static_cast<uint64_t>(tile.position) + (first + i * kThreads) * sizeof(Word));
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) checksum_kernel(const Tile* tiles, uint32_t num_tiles, bool of_source,
                                                            uint32_t* cursor, uint64_t* total) {
  __shared__ TileStream::Shared shared;
  TileStream stream(shared, tiles, num_tiles, cursor);
  uint64_t sum = 0;
  while (const Tile* tile = stream.next()) {
    with_access_type(*tile, [&](auto* type) {
      sum += sum_tile<std::remove_pointer_t<decltype(type)>>(*tile, of_source);
    });
  }
  add_block_sum(sum, total);
}

}  // namespace

cudaError_t checksum_tiles(const Tile* tiles, int64_t num_tiles, bool of_source, uint32_t* cursor, uint64_t* sum,
                           cudaStream_t stream) {
  if (num_tiles == 0) return cudaSuccess;
  int blocks = 0;
  if (auto error = resident_blocks(checksum_kernel, kThreads, num_tiles, blocks)) return error;
  checksum_kernel<<<blocks, kThreads, 0, stream>>>(tiles, static_cast<uint32_t>(num_tiles), of_source, cursor, sum);
  return cudaGetLastError();
}

}  // namespace mrl::cuda
