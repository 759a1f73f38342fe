// A persistent grid's way through a list of tiles: blocks take tiles in order, each when it has done its last one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "mrl/checksum.h"
#include "mrl/tile.h"

namespace mrl::cuda {

// Hands every thread of a block the same tiles. The cursor and the descriptor of the next tile are fetched while the
// current one is worked on: their latency, about that of 20 KB of a tile, would otherwise be paid for every tile.
class TileStream {
 public:
  struct Shared {
    Tile tiles[2];
  };

  // Called by all threads.
  __device__ TileStream(Shared& shared, const Tile* tiles, uint32_t num_tiles, uint32_t* cursor)
      : shared_(shared), tiles_(tiles), num_tiles_(num_tiles), cursor_(cursor) {
    if (threadIdx.x != 0) return;
    const uint32_t first = atomicAdd(cursor_, 2u);
    fetch(first, 0);
    upcoming_ = first + 1;
  }

  // The next tile, or null. Called by all threads; the tile is valid until the next call.
  __device__ const Tile* next() {
    if (threadIdx.x == 0) asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    const Tile* current = &shared_.tiles[slot_];
    slot_ ^= 1;
    if (current->rows == 0) return nullptr;
    if (threadIdx.x == 0) {
      fetch(upcoming_, slot_);
      upcoming_ = atomicAdd(cursor_, 1u);
    }
    return current;
  }

 private:
  __device__ void fetch(uint32_t index, int slot) {
    Tile* target = &shared_.tiles[slot];
    if (index >= num_tiles_) {
      target->rows = 0;
      return;
    }
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    const char* source = reinterpret_cast<const char*>(tiles_ + index);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Tile)); i += 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + i), "l"(source + i) : "memory");
    }
  }

  Shared& shared_;
  const Tile* tiles_;
  uint32_t num_tiles_;
  uint32_t* cursor_;
  uint32_t upcoming_ = 0;
  int slot_ = 0;
};

// Where the accesses of `Word`'s size in a tile lie. Exact below kMaxAccessesPerTile.
template <typename Word>
class AccessGrid {
 public:
  __device__ explicit AccessGrid(const Tile& tile)
      : per_row_(static_cast<uint32_t>(tile.row_bytes / sizeof(Word))),
        reciprocal_(0xFFFFFFFFu / per_row_ + 1),
        count_(per_row_ * static_cast<uint32_t>(tile.rows)) {}

  __device__ uint32_t count() const { return count_; }

  __device__ int64_t offset(uint32_t access, int64_t pitch) const {
    // A row of one access has the reciprocal 2^32, which does not fit.
    const uint32_t row = per_row_ == 1 ? access : __umulhi(access, reciprocal_);
    return row * pitch + static_cast<int64_t>(access - row * per_row_) * static_cast<int64_t>(sizeof(Word));
  }

 private:
  uint32_t per_row_;
  uint32_t reciprocal_;
  uint32_t count_;
};

__device__ __forceinline__ uint64_t weighted_word(uint4 word, uint64_t position) {
  const uint64_t low = word.x | static_cast<uint64_t>(word.y) << 32;
  const uint64_t high = word.z | static_cast<uint64_t>(word.w) << 32;
  return low * multiplier(position / 8) + high * multiplier(position / 8 + 1);
}

__device__ __forceinline__ uint64_t weighted_word(uint2 word, uint64_t position) {
  return (word.x | static_cast<uint64_t>(word.y) << 32) * multiplier(position / 8);
}

template <typename Word>
__device__ __forceinline__ uint64_t weighted_word(Word word, uint64_t position) {
  return weighted(word, position);
}

// Calls `work` with a null pointer of the widest type that the tile may be accessed with.
template <typename Work>
__device__ __forceinline__ void with_access_type(const Tile& tile, Work work) {
  switch (tile.width()) {
    case 16:
      return work(static_cast<uint4*>(nullptr));
    case 8:
      return work(static_cast<uint2*>(nullptr));
    case 4:
      return work(static_cast<uint32_t*>(nullptr));
    case 2:
      return work(static_cast<uint16_t*>(nullptr));
    default:
      return work(static_cast<uint8_t*>(nullptr));
  }
}

// Adds the sum over the block's threads to `*total`, one atomic for each warp. Called by all threads of the block.
__device__ __forceinline__ void add_block_sum(uint64_t value, uint64_t* total) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, lanes);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(total), value);
}

// Sets `blocks` to as many as are resident on the current device at once, at most one for each tile.
template <typename Kernel>
cudaError_t resident_blocks(Kernel kernel, int threads, int64_t num_tiles, int& blocks) {
  int device = 0;
  int processors = 0;
  int per_processor = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0)) return error;
  const int64_t resident = static_cast<int64_t>(processors) * per_processor;
  blocks = static_cast<int>(resident < num_tiles ? resident : num_tiles);
  return cudaSuccess;
}

}  // namespace mrl::cuda
