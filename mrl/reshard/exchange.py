"""Weights between hosts: gathered into staging memory, sent point to point, scattered where they arrive.

Knows no process group: what carries the bytes is a `Wire`. All engine ranks start their messages in one common order
and have at most `SLOTS` of either direction under way. The first message of that order that is not through finds a
slot free at both of its ends, so that no pattern of senders and receivers can block itself.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mrl.reshard.errors import ReshardError
from mrl.reshard.execute import BufferKey
from mrl.reshard.execute_torch import copy_views, word_view
from mrl.reshard.messages import Message, build_messages, by_round, transfer_digest
from mrl.reshard.operations import CopyOp
from mrl.reshard.plan import Plan

STAGING_BYTES = 32 * 2**20
"""Of one message. Long against what starting one costs (at 100 Gb/s it takes 2.7 ms), and `SLOTS` of them in either
direction, 128 MiB together, are little beside the weights that they serve."""
SLOTS = 2
"""One message is packed or unpacked while another is on its way."""

Finish = Callable[[], None]
"""Waits for the end of what was started."""


class Wire(Protocol):
    """Point-to-point messages among all engine ranks; those of one pair and direction arrive in their order."""

    def send(self, tensor: Tensor, peer: int) -> Finish:
        """Start sending; once finished the tensor may be overwritten.

        Finishing raises ReshardError when the peer is gone or the exchange takes too long.
        """
        ...

    def receive(self, tensor: Tensor, peer: int) -> Finish:
        """Start receiving; once finished the tensor is filled. Raises as `send`."""
        ...


@dataclass(kw_only=True, frozen=True)
class ExchangeResult:
    """What one exchange did on this rank."""

    sent_bytes: int
    """Of weights, as they went onto the wire. Each peer also gets 32 bytes and 8 for every copy, to compare."""
    received_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _End:
    """This rank's end of one transfer."""

    peer: int
    sending: bool
    digest: bytes
    parts: tuple[CopyOp, ...]
    """The copies as the messages cut them."""


class Exchange:
    """The sends and receives of a plan bound to memory.

    Args:
        buffers: [num_bytes] uint8 of every trainer buffer of this host that the plan sends from.
        params: the engine rank's live parameters by name.
        rank, num_ranks: of this engine rank among all of the job.
        capacity: most bytes of one message, a multiple of 8.
    """

    def __init__(
        self,
        plan: Plan,
        buffers: Mapping[BufferKey, Tensor],
        params: Mapping[str, Tensor],
        *,
        rank: int,
        num_ranks: int,
        capacity: int = STAGING_BYTES,
    ) -> None:
        self._buffers = buffers
        self._params = {name: param.detach().view(-1).view(torch.uint8) for name, param in params.items()}
        self._device = next(iter(params.values())).device
        self._messages = build_messages(plan, rank=rank, num_ranks=num_ranks, capacity=capacity)
        parts: dict[tuple[int, bool], list[CopyOp]] = defaultdict(list)
        for message in self._messages:
            parts[message.peer, message.sending] += message.parts
        self._ends = [
            _End(transfer.peer, sending, transfer_digest(transfer), tuple(parts[transfer.peer, sending]))
            for sending, transfer in by_round(plan, rank=rank, num_ranks=num_ranks)
        ]

    @torch.no_grad()
    def run(self, wire: Wire) -> ExchangeResult:
        """Send and receive everything; returns when all that this rank is due has arrived and is what was sent.

        Called by all engine ranks that send or receive anything. The words of every copy are summed on both sides once
        this rank's messages are through, so that a write by the trainer meanwhile is seen, too.

        Raises:
            ReshardError: a peer planned something else, is gone or too slow, or the sums of a copy differ.
        """
        start, counts = time.perf_counter(), {True: 0, False: 0}
        _run_in_order((end.sending, partial(self._compare_plans, wire, end)) for end in self._ends)
        staging = {sending: self._staging(sending) for sending in (True, False)}
        _run_in_order(
            (message.sending, partial(self._deliver, wire, message, staging[message.sending], counts))
            for message in self._messages
        )
        _run_in_order((end.sending, partial(self._compare_sums, wire, end)) for end in self._ends)
        return ExchangeResult(
            sent_bytes=counts[True], received_bytes=counts[False], seconds=time.perf_counter() - start
        )

    def _compare_plans(self, wire: Wire, end: _End) -> Finish:
        own = torch.frombuffer(bytearray(end.digest), dtype=torch.uint8).to(self._device)
        if end.sending:
            return wire.send(own, end.peer)
        theirs = torch.empty_like(own)
        wait = wire.receive(theirs, end.peer)

        def finish() -> None:
            wait()
            if not torch.equal(own, theirs):
                raise ReshardError(
                    f"engine rank {end.peer} planned to send something else than this rank expects; do all engines run "
                    "the same model and version of mrl?"
                )

        return finish

    def _staging(self, sending: bool) -> deque[Tensor]:
        sizes = [message.num_bytes for message in self._messages if message.sending == sending]
        size = max(sizes, default=0)
        return deque(torch.empty(size, dtype=torch.uint8, device=self._device) for _ in sizes[:SLOTS])

    def _deliver(self, wire: Wire, message: Message, staging: deque[Tensor], counts: dict[bool, int]) -> Finish:
        memory = staging.popleft()
        packed = memory[: message.num_bytes]
        if message.sending:
            self._pack(message, packed)
        wait = (wire.send if message.sending else wire.receive)(packed, message.peer)

        def finish() -> None:
            wait()
            if not message.sending:
                self._unpack(message, packed)
            counts[message.sending] += packed.numel()
            staging.append(memory)

        return finish

    def _pack(self, message: Message, packed: Tensor) -> None:
        for op, at in _places(message.parts):
            gather = replace(op, dst_offset=at, dst_pitch=op.row_bytes)
            target, source = copy_views(gather, self._buffers[op.src_rank, op.src_buffer], packed)
            target.copy_(source)

    def _unpack(self, message: Message, packed: Tensor) -> None:
        for op, at in _places(message.parts):
            scatter = replace(op, src_offset=at, src_pitch=op.row_bytes)
            target, source = copy_views(scatter, packed, self._params[op.dst_param])
            target.copy_(source)

    def _compare_sums(self, wire: Wire, end: _End) -> Finish:
        if end.sending:
            sums = [
                _sum(self._buffers[op.src_rank, op.src_buffer], op, op.src_offset, op.src_pitch) for op in end.parts
            ]
            return wire.send(torch.stack(sums), end.peer)
        sent = torch.empty(len(end.parts), dtype=torch.int64, device=self._device)
        wait = wire.receive(sent, end.peer)

        def finish() -> None:
            wait()
            arrived = torch.stack(
                [_sum(self._params[op.dst_param], op, op.dst_offset, op.dst_pitch) for op in end.parts]
            )
            _check_sums(end, sent.tolist(), arrived.tolist())

        return finish


def _run_in_order(steps: Iterable[tuple[bool, Callable[[], Finish]]]) -> None:
    """Start every step in order, as soon as its direction has a slot free, and finish all."""
    under_way: dict[bool, deque[Finish]] = {True: deque(), False: deque()}
    for sending, start in steps:
        if len(under_way[sending]) == SLOTS:
            under_way[sending].popleft()()
        under_way[sending].append(start())
    for finishes in under_way.values():
        while finishes:
            finishes.popleft()()


def _places(parts: Sequence[CopyOp]) -> Iterator[tuple[CopyOp, int]]:
    """Every copy of a message and where its bytes start in it."""
    at = 0
    for op in parts:
        yield op, at
        at += op.num_bytes


def _sum(memory: Tensor, op: CopyOp, offset: int, pitch: int) -> Tensor:
    """Sum of the words on one side of a copy. 0-d int64; both sides take words of the size that divides it all."""
    strides = (op.src_pitch, op.dst_pitch) if op.rows > 1 else ()
    word = math.gcd(8, op.row_bytes, op.src_offset, op.dst_offset, *strides)
    if (memory.data_ptr() + offset) % word:
        rows = word_view(memory, offset, pitch, op.rows, op.row_bytes, 1).clone(memory_format=torch.contiguous_format)
        return word_view(rows.view(-1), 0, op.row_bytes, op.rows, op.row_bytes, word).sum(dtype=torch.int64)
    return word_view(memory, offset, pitch, op.rows, op.row_bytes, word).sum(dtype=torch.int64)


def _check_sums(end: _End, sent: Sequence[int], arrived: Sequence[int]) -> None:
    for op, expected, found in zip(end.parts, sent, arrived, strict=True):
        if expected != found:
            raise ReshardError(
                f"parameter {op.dst_param}: checksum {found:#x} of what arrived differs from {expected:#x} of what "
                f"trainer rank {op.src_rank} holds, sent by engine rank {end.peer}; it changed its weights during the "
                "exchange, or bytes were corrupted. Update again"
            )
