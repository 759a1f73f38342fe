#include <algorithm>
#include <cstddef>
#include <map>
#include <numeric>

#include "mrl/tiles_cpu.h"

namespace mrl::cpu {
namespace {

constexpr int64_t kCutAlignment = 128;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

Descriptor with_joined_rows(Descriptor op) {
  const bool joined = op.dst_pitch == op.row_bytes && (op.src_pitch == op.row_bytes || op.src == 0);
  if (op.rows > 1 && joined) {
    op.row_bytes *= op.rows;
    op.rows = 1;
  }
  if (op.rows == 1) op.src_pitch = op.dst_pitch = op.row_bytes;
  if (op.src == 0) op.src_pitch = 0;
  return op;
}

int64_t widest_access(const Descriptor& op) {
  int64_t width = std::gcd(std::gcd(kWidestAccess, op.row_bytes), std::gcd(op.src, op.dst));
  if (op.rows > 1) width = std::gcd(width, std::gcd(op.src_pitch, op.dst_pitch));
  return width;
}

class Cutter {
 public:
  Cutter(int64_t tile_bytes, std::vector<Tile>& tiles) : tile_bytes_(tile_bytes), tiles_(tiles) {}

  void cut(const Descriptor& op, int64_t op_index, int64_t op_position) {
    const int64_t width = widest_access(op);
    const int64_t limit = std::min(tile_bytes_, width * kMaxAccessesPerTile);
    op_ = op;
    op_position_ = op_position;
    op_and_width_ = op_index * Tile::kWidthBase + width;
    if (op.row_bytes > limit) {
      cut_rows(limit);
    } else {
      group_rows(limit);
    }
  }

 private:
  // Tiles of equal parts of one row; cut points keep the alignment.
  void cut_rows(int64_t limit) {
    const int64_t parts = (op_.row_bytes + limit - 1) / limit;
    const int64_t part = std::min(limit, round_up((op_.row_bytes + parts - 1) / parts, kCutAlignment));
    for (int64_t row = 0; row < op_.rows; ++row) {
      for (int64_t left = 0; left < op_.row_bytes; left += part) {
        add(row, 1, left, std::min(part, op_.row_bytes - left));
      }
    }
  }

  // Tiles of about equal numbers of whole rows.
  void group_rows(int64_t limit) {
    const int64_t most = limit / op_.row_bytes;
    const int64_t groups = (op_.rows + most - 1) / most;
    const int64_t group = (op_.rows + groups - 1) / groups;
    for (int64_t row = 0; row < op_.rows; row += group) add(row, std::min(group, op_.rows - row), 0, op_.row_bytes);
  }

  void add(int64_t row, int64_t rows, int64_t left, int64_t row_bytes) {
    tiles_.push_back(Tile{
        .src = op_.src == 0 ? 0 : op_.src + row * op_.src_pitch + left,
        .src_pitch = op_.src_pitch,
        .dst = op_.dst + row * op_.dst_pitch + left,
        .dst_pitch = op_.dst_pitch,
        .rows = rows,
        .row_bytes = row_bytes,
        .position = op_position_ + row * op_.row_bytes + left,
        .op_and_width = op_and_width_,
    });
  }

  int64_t tile_bytes_;
  std::vector<Tile>& tiles_;
  Descriptor op_{};
  int64_t op_position_ = 0;
  int64_t op_and_width_ = 0;
};

struct Queue {
  std::vector<Tile> tiles;
  double total_bytes = 0;
  double taken_bytes = 0;
  std::size_t next = 0;
};

// Always the source of which the smallest share is taken: fast and slow links are busy from the first tile to the last.
std::vector<Tile> interleave(std::map<int64_t, Queue>& queues) {
  std::vector<Tile> merged;
  std::size_t count = 0;
  for (auto& [source, queue] : queues) {
    count += queue.tiles.size();
    for (const Tile& tile : queue.tiles) queue.total_bytes += static_cast<double>(tile.num_bytes());
  }
  merged.reserve(count);
  while (merged.size() < count) {
    Queue* least = nullptr;
    for (auto& [source, queue] : queues) {
      if (queue.next == queue.tiles.size()) continue;
      if (!least || queue.taken_bytes * least->total_bytes < least->taken_bytes * queue.total_bytes) least = &queue;
    }
    merged.push_back(least->tiles[least->next++]);
    least->taken_bytes += static_cast<double>(merged.back().num_bytes());
  }
  return merged;
}

}  // namespace

std::string find_error(const Descriptor* ops, int64_t num_ops) {
  for (int64_t i = 0; i < num_ops; ++i) {
    const Descriptor& op = ops[i];
    const bool src_apart = op.src == 0 || op.src_pitch >= op.row_bytes;
    const bool strided = op.rows <= 1 || (src_apart && op.dst_pitch >= op.row_bytes);
    if (op.src >= 0 && op.dst > 0 && op.rows > 0 && op.row_bytes > 0 && strided) continue;
    return "operation " + std::to_string(i) + " (src " + std::to_string(op.src) + ", src_pitch " +
           std::to_string(op.src_pitch) + ", dst " + std::to_string(op.dst) + ", dst_pitch " +
           std::to_string(op.dst_pitch) + ", rows " + std::to_string(op.rows) + ", row_bytes " +
           std::to_string(op.row_bytes) +
           ") is no strided copy: addresses, rows and row_bytes must be positive (src 0 fills with zeros) and pitches "
           "at least row_bytes";
  }
  return "";
}

std::vector<Tile> build_tiles(const Descriptor* ops, int64_t num_ops, const int64_t* sources, int64_t tile_bytes) {
  std::map<int64_t, Queue> queues;
  int64_t position = 0;
  for (int64_t i = 0; i < num_ops; ++i) {
    Queue& queue = queues[sources ? sources[i] : 0];
    Cutter(tile_bytes, queue.tiles).cut(with_joined_rows(ops[i]), i, position);
    position = round_up(position + ops[i].rows * ops[i].row_bytes, kWidestAccess);
  }
  return interleave(queues);
}

}  // namespace mrl::cpu
