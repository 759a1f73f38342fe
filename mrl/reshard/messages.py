"""Transfers between hosts cut into messages of bounded size, in one order for all engine ranks. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mrl.reshard.operations import CopyOp
from mrl.reshard.plan import Plan
from mrl.reshard.transfers import Transfer


@dataclass(frozen=True, slots=True)
class Message:
    """Some of a transfer's bytes, packed: row after row, copy after copy."""

    order: tuple[int, int, int]
    """All engine ranks start their messages in this order; it has no cycles, whoever sends to whom."""
    peer: int
    sending: bool
    parts: tuple[CopyOp, ...]

    @property
    def num_bytes(self) -> int:
        return sum(op.num_bytes for op in self.parts)


def build_messages(plan: Plan, *, rank: int, num_ranks: int, capacity: int) -> list[Message]:
    """The messages of a plan's transfers, in their order.

    In its first round every rank sends to the next one, then to the one after, and so on: where all ranks send alike,
    each sends to one and receives from one at any time.

    Args:
        rank, num_ranks: of this engine rank among all engine ranks of the job.
        capacity: most bytes of one message, a multiple of 8.
    """
    messages = [
        Message((distance, number, sender), transfer.peer, sending, tuple(parts))
        for distance, sender, sending, transfer in _ends(plan, rank, num_ranks)
        for number, parts in enumerate(cut(transfer.copies, capacity))
    ]
    return sorted(messages, key=lambda message: message.order)


def by_round(plan: Plan, *, rank: int, num_ranks: int) -> list[tuple[bool, Transfer]]:
    """(whether this rank sends it, transfer), in the order of the messages."""
    ends = sorted(_ends(plan, rank, num_ranks), key=lambda end: end[:2])
    return [(sending, transfer) for _, _, sending, transfer in ends]


def _ends(plan: Plan, rank: int, num_ranks: int) -> Iterator[tuple[int, int, bool, Transfer]]:
    """(distance from sender to receiver, sender, whether that is this rank, transfer)"""
    for transfer in plan.sends:
        yield (transfer.peer - rank) % num_ranks, rank, True, transfer
    for transfer in plan.receives:
        yield (rank - transfer.peer) % num_ranks, transfer.peer, False, transfer


def transfer_digest(transfer: Transfer) -> bytes:
    """32 bytes that both ends of a transfer agree on if they planned the same."""
    return hashlib.sha256(repr(transfer.copies).encode()).digest()


def cut(copies: Iterable[CopyOp], capacity: int) -> Iterator[list[CopyOp]]:
    """The copies in groups of at most `capacity` bytes; a copy that leaves a group's end is cut there."""
    group: list[CopyOp] = []
    room = capacity
    for op in _narrow(copies, capacity):
        rest: CopyOp | None = op
        while rest is not None:
            head, rest = _split(rest, room)
            if head is not None:
                group.append(head)
                room -= head.num_bytes
            if rest is not None or not room:
                yield group
                group, room = [], capacity
    if group:
        yield group


def _narrow(copies: Iterable[CopyOp], capacity: int) -> Iterator[CopyOp]:
    """The same copies, with rows longer than `capacity` each on its own."""
    for op in copies:
        if op.rows == 1 or op.row_bytes <= capacity:
            yield op
        else:
            yield from (_rows(op, row, 1) for row in range(op.rows))


def _split(op: CopyOp, room: int) -> tuple[CopyOp | None, CopyOp | None]:
    """What fits into `room` bytes, and the rest: whole rows, or bytes of a single one."""
    if op.num_bytes <= room:
        return op, None
    if op.rows > 1:
        rows = room // op.row_bytes
        return (_rows(op, 0, rows) if rows else None), _rows(op, rows, op.rows - rows)
    if not room:
        return None, op
    rest = replace(op, src_offset=op.src_offset + room, dst_offset=op.dst_offset + room, row_bytes=op.row_bytes - room)
    return replace(op, row_bytes=room), rest


def _rows(op: CopyOp, first: int, rows: int) -> CopyOp:
    return replace(
        op,
        src_offset=op.src_offset + first * op.src_pitch,
        dst_offset=op.dst_offset + first * op.dst_pitch,
        rows=rows,
    )
