"""Random plans over two buffers, and what they must do, byte by byte."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class RandomPlan:
    source: np.ndarray
    """uint8."""
    target: np.ndarray
    """uint8, same size; poisoned."""
    ops: list[tuple[int, int, int, int, int, int]]
    """(source offset or None for a fill, source pitch, target offset, target pitch, rows, row bytes)."""

    @property
    def descriptors(self):
        base, to = self.source.ctypes.data, self.target.ctypes.data
        rows = [(0 if s is None else base + s, sp, to + t, tp, rows, size) for s, sp, t, tp, rows, size in self.ops]
        return torch.tensor(rows, dtype=torch.int64)

    def expected(self):
        """The target after the plan: the slow loop."""
        result = self.target.copy()
        for start, src_pitch, to, dst_pitch, rows, size in self.ops:
            for row in range(rows):
                at = to + row * dst_pitch
                result[at : at + size] = 0 if start is None else self.source[start + row * src_pitch :][:size]
        return result


def random_plan(seed, num_ops=40, num_bytes=1 << 17):
    """Disjoint targets at every alignment from 1 to 16, fills among them, rows joined and apart."""
    rng = np.random.default_rng(seed)
    source, target = (rng.integers(0, 256, num_bytes, dtype=np.uint8) for _ in range(2))
    ops, at = [], 0
    for index in range(num_ops):
        unit = int(rng.choice([1, 2, 4, 8, 16]))
        rows, size = int(rng.integers(1, 9)), int(rng.integers(1, 40)) * unit
        src_pitch, dst_pitch = (size + int(rng.integers(0, 3)) * unit for _ in range(2))
        at = -(-at // unit) * unit
        start = int(rng.integers(0, (num_bytes - rows * src_pitch) // unit)) * unit
        ops.append((None if index % 7 == 3 else start, src_pitch, at, dst_pitch, rows, size))
        at += rows * dst_pitch
    assert at <= num_bytes
    return RandomPlan(source, target, ops)
