"""Router replay: the model sends each token to the experts to which the engine sent it.

Trainer and engine compute a token's router logits with different kernels. Where experts are nearly tied they choose
differently, and what that token and those after it compute is then another function of the same weights. With replay
the choice is the engine's; the weights of the chosen experts are the trainer's own, so that the router has gradients.

A pipeline schedule runs other micro-batches between the forward and the backward pass of one, and layers that are
recomputed in the latter choose again. Such a layer keeps what it was given until then: backward passes come in the
order of the forward passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mrl.backends.megatron.inputs import ModelInputs
from mrl.backends.megatron.model import ModelChunk

Topk = Callable[..., tuple[Tensor, Tensor]]


class RouterReplay:
    """Replay in all routers of one role on this rank.

    Args:
        chunks: of the role; every layer has experts.
        k: experts of each token.
    """

    def __init__(self, chunks: Sequence[ModelChunk], groups: ProcessGroupCollection, *, k: int) -> None:
        self._k = k
        self._layers = [chunk.layers for chunk in chunks]
        self._routers = [[_take_over(layer.mlp.router) for layer in chunk.bare.decoder.layers] for chunk in chunks]
        # Where activations are split along the sequence, a router sees its rank's part of it.
        self._parts = groups.tp if chunks[0].bare.config.sequence_parallel else None

    @contextmanager
    def running(self, *, with_backward: bool) -> Iterator[None]:
        """Around a pass over micro-batches."""
        routers = [router for chunk in self._routers for router in chunk]
        for router in routers:
            router.begin(with_backward=with_backward)
        try:
            yield
        finally:
            for router in routers:
                router.end()

    @contextmanager
    def forward_step(self, inputs: ModelInputs, routed_experts: Sequence[Tensor], chunk: int) -> Iterator[None]:
        """Around the forward pass of one micro-batch through one chunk.

        Args:
            routed_experts: of its samples.
        """
        layers, routers = self._layers[chunk], self._routers[chunk]
        columns = slice(layers.start * self._k, layers.stop * self._k)
        choices = spread_choices(inputs, [experts[:, columns] for experts in routed_experts])
        if self._parts is not None:
            choices = choices.chunk(self._parts.size())[self._parts.rank()]
        for router, choice in zip(routers, choices.flatten(0, 1).split(self._k, dim=1), strict=True):
            router.choices = choice
        try:
            yield
        finally:
            for router in routers:
                router.choices = None

    def count_changed(self) -> tuple[int, int]:
        """Of the choices made on this rank in the last pass, those that its routers would not have made, and all."""
        counts = torch.stack([router.counts for chunk in self._routers for router in chunk]).sum(0)
        changed, made = counts.tolist()
        return changed, made


class ReplayingRouter:
    """Stands in for megatron's `RouterReplay` in the router of one layer."""

    def __init__(self) -> None:
        self.choices: Tensor | None = None
        """[n, k] int16 of the forward pass that runs; -1 where the engine has chosen nothing."""
        self.counts = torch.zeros(2, dtype=torch.int64)
        self._is_running = False
        self._with_backward = False
        self._recomputed_later: deque[Tensor] = deque()

    def begin(self, *, with_backward: bool) -> None:
        """Expect forward passes, and choices for each."""
        self._is_running, self._with_backward = True, with_backward
        self.counts = torch.zeros_like(self.counts)

    def end(self) -> None:
        """Choose freely again."""
        self._is_running = False
        self._recomputed_later.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Topk = torch.topk,
    ) -> tuple[Tensor, Tensor]:
        """The scores of each token's experts and their numbers, [n, k] both, from the scores of all experts [n, E]."""
        own_scores, own = default_compute_topk(scores, topk, num_groups, group_topk)
        if not self._is_running:
            return own_scores, own
        given = self._given(own).long()
        chosen = torch.where(given < 0, own, given)
        return scores.gather(1, chosen), chosen

    def _given(self, own: Tensor) -> Tensor:
        if self.choices is None:
            # In a backward pass, which does not say of which micro-batch it is.
            return self._recomputed_later.popleft()
        if self._with_backward and not torch.is_grad_enabled():
            self._recomputed_later.append(self.choices)
        self.counts = self.counts.to(own.device) + count_changed(self.choices, own)
        return self.choices


def count_changed(given: Tensor, own: Tensor) -> Tensor:
    """Of given choices, those that are not among a router's own, and all. [n, k] both, -1 for none -> [2] int64."""
    made = given >= 0
    changed = made & (given.unsqueeze(2) != own.unsqueeze(1)).all(2)
    return torch.stack([changed.sum(), made.sum()])


def spread_choices(inputs: ModelInputs, routed_experts: Sequence[Tensor]) -> Tensor:
    """What the engine chose for every position of the model: [t, b, layers k] or [N / cp, 1, layers k] int16.

    -1 where it chose nothing: for the last token of each sample and for padding.

    Args:
        routed_experts: [tokens - 1, layers k] of each sample, on the CPU.
    """
    longest = max(len(each) for each in routed_experts)
    table = torch.full((len(routed_experts) + 1, longest + 1, routed_experts[0].shape[1]), -1, dtype=torch.int16)
    for row, each in zip(table, routed_experts, strict=False):
        row[: len(each)] = each
    device = inputs.tokens.device
    if device.type == "cuda":
        # Without it the copy would wait for all that the device has to do.
        table = table.pin_memory()
    # Padding lies behind the last sample, or behind the last token of one.
    return table.to(device, non_blocking=True)[inputs.samples, inputs.positions.clamp(max=longest)].transpose(0, 1)


def _take_over(router: torch.nn.Module) -> ReplayingRouter:
    replaying = ReplayingRouter()
    router.router_replay = replaying  # type: ignore[assignment]
    return replaying
