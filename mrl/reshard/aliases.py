"""Which of an engine's parameters can be the trainer's own memory instead of a copy of it. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mrl.reshard.layout import TargetParam
from mrl.reshard.operations import coalesce
from mrl.reshard.overlaps import Overlap
from mrl.reshard.routes import LocalChoice
from mrl.reshard.sources import Replica

ALIGNMENT_BYTES = 128
"""What an aliased parameter's address must divide by: Megatron's buffers start parameters at every 64th element.

Matrix kernels need 16; 128 is a line of the GPU's caches.
"""


@dataclass(frozen=True, slots=True)
class Alias:
    """All bytes of a parameter are `num_bytes` consecutive bytes of a buffer on its device."""

    dst_param: str
    src_rank: int
    src_buffer: int
    src_offset: int
    num_bytes: int


def find_alias(target: TargetParam, found: Sequence[Overlap], near: LocalChoice) -> Alias | None:
    """The place of the whole parameter in one buffer of its own device; None if no trainer rank has it so.

    Args:
        found: all that the parameter has in common with the sources' boxes.
    """
    if sum(overlap.num_bytes for overlap in found) != target.num_bytes:
        return None
    replicas = [{source.rank: replica for replica, source in near.on_device(overlap.holding)} for overlap in found]
    for rank in sorted(set.intersection(*(set(by_rank) for by_rank in replicas))):
        alias = _in_one_run(target, found, [by_rank[rank] for by_rank in replicas], rank)
        if alias is not None:
            return alias
    return None


def _in_one_run(target: TargetParam, found: Sequence[Overlap], replicas: Sequence[Replica], rank: int) -> Alias | None:
    copies = [overlap.copy_from(replica, rank) for overlap, replica in zip(found, replicas, strict=True)]
    first, *more = coalesce(copies)
    if more or first.rows > 1 or first.row_bytes != target.num_bytes or first.src_offset % ALIGNMENT_BYTES:
        return None
    return Alias(target.name, rank, first.src_buffer, first.src_offset, target.num_bytes)
