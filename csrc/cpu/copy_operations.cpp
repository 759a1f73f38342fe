#include <cstddef>
#include <cstring>

#include "mrl/tiles_cpu.h"

namespace mrl::cpu {

void copy_operations(const Descriptor* ops, int64_t num_ops) {
  for (const Descriptor* op = ops; op < ops + num_ops; ++op) {
    for (int64_t row = 0; row < op->rows; ++row) {
      std::memcpy(reinterpret_cast<void*>(op->dst + row * op->dst_pitch),
                  reinterpret_cast<const void*>(op->src + row * op->src_pitch),
                  static_cast<std::size_t>(op->row_bytes));
    }
  }
}

}  // namespace mrl::cpu
