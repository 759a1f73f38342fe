// A plan's operations, and the tiles they are cut into: the records that the builder, the loops and the kernels share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MRL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRL_HOST_DEVICE inline
#endif

namespace mrl {

// A strided copy, or a fill where `src` is 0. A row of the [num_ops, 6] int64 tensor, in this order.
struct Descriptor {
  int64_t src, src_pitch, dst, dst_pitch, rows, row_bytes;

  bool is_one_run() const { return rows == 1 || (src_pitch == row_bytes && dst_pitch == row_bytes); }

  static constexpr int64_t kFields = 6;
};

static_assert(sizeof(Descriptor) == Descriptor::kFields * sizeof(int64_t), "mrl/ops/tiles.py names the fields");

// `rows` runs of `row_bytes` bytes. A row of the [num_tiles, 8] int64 tensor, in this order.
struct alignas(16) Tile {
  int64_t src;        // address of the first byte; 0: the destination is set to zero
  int64_t src_pitch;  // bytes from row to row
  int64_t dst;
  int64_t dst_pitch;
  int64_t rows;
  int64_t row_bytes;
  int64_t position;      // of the first byte in the plan; row r starts row_bytes * r further
  int64_t op_and_width;  // index of the operation * kWidthBase + widest safe access in bytes

  MRL_HOST_DEVICE int64_t width() const { return op_and_width % kWidthBase; }
  MRL_HOST_DEVICE int64_t num_bytes() const { return rows * row_bytes; }

  static constexpr int64_t kWidthBase = 32;
};

constexpr int64_t kTileFields = sizeof(Tile) / sizeof(int64_t);
static_assert(kTileFields == 8, "mrl/ops/tiles.py names the fields of a tile");

constexpr int64_t kWidestAccess = 16;
// Kernels divide an access's index by the accesses in a row with one 32-bit multiplication, exact below this.
constexpr int64_t kMaxAccessesPerTile = int64_t{1} << 16;
constexpr int64_t kMinTileBytes = 128;
constexpr int64_t kMaxTileBytes = kMaxAccessesPerTile * kWidestAccess;

}  // namespace mrl
