"""Batches of prompts in a seeded order that can be resumed exactly."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mrl.types import Prompt


class PromptLoader:
    """An endless iterator over batches; every rank that builds it with the same arguments sees the same batches.

    Each epoch is a permutation that depends on the seed and the epoch's number alone. Batches never span epochs: the
    prompts left over at the end of an epoch are dropped, others in each epoch if shuffled.

    Raises:
        ValueError: the batch is larger than the data set.
    """

    def __init__(self, prompts: Sequence[Prompt], *, batch_size: int, shuffle: bool, seed: int) -> None:
        if not 0 < batch_size <= len(prompts):
            raise ValueError(
                f"batch_size = {batch_size} must be between 1 and the number of prompts, {len(prompts)}; "
                "lower data.train_batch_size (or data.gen_batch_size), or add data (over-long prompts may have been "
                "filtered)"
            )
        self._prompts = prompts
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._batch = 0
        self._order = self._compute_order(0)

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return len(self._prompts) // self._batch_size

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0, that the next batch belongs to."""
        return self._epoch

    def __iter__(self) -> Iterator[list[Prompt]]:
        return self

    def __next__(self) -> list[Prompt]:
        first = self._batch * self._batch_size
        batch = [self._prompts[index] for index in self._order[first : first + self._batch_size]]
        self._batch += 1
        if self._batch == self.batches_per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
            self._order = self._compute_order(self._epoch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, and what identifies data and order; plain numbers."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state belongs to other prompts, another batch size, shuffling or seed.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"cannot resume the data order: {name} was {state.get(name)!r} in the checkpoint and is {value!r} "
                    "now; use the same data and settings, or start a new run"
                )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._order = self._compute_order(self._epoch)

    def _identity(self) -> dict[str, Any]:
        token_ids = zlib.crc32(b"")
        for prompt in self._prompts:
            token_ids = zlib.crc32(np.asarray(prompt.token_ids, dtype=np.int64).tobytes(), token_ids)
        return {
            "num_prompts": len(self._prompts),
            "token_ids_crc32": token_ids,
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def _compute_order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts)).tolist()
