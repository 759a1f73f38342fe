"""Samples of a step as metrics and as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mrl.types import Sample


def summarize_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over samples: reward and its named parts, lengths, share cut at the length limit, weight version."""
    count = len(samples)
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    lengths = [len(sample.generation.response_ids) for sample in samples]
    metrics = {
        "reward/mean": sum(rewards) / count,
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "response/length_mean": sum(lengths) / count,
        "response/length_max": float(max(lengths)),
        "response/truncated_fraction": sum(s.generation.finish_reason == "length" for s in samples) / count,
        "prompt/length_mean": sum(len(sample.prompt.token_ids) for sample in samples) / count,
        "rollout/weight_version": float(min(sample.generation.weight_version for sample in samples)),
    }
    if any(sample.turns for sample in samples):
        answers = [sum(turn["role"] == "assistant" for turn in sample.turns) for sample in samples]
        metrics |= {"response/turns_mean": sum(answers) / count, "response/turns_max": float(max(answers))}
    for part in sorted({key for sample in samples for key in sample.reward_info}):
        values = [sample.reward_info[part] for sample in samples if part in sample.reward_info]
        metrics[f"reward/{part.removeprefix('reward/')}"] = sum(values) / len(values)
    return metrics


class SampleWriter:
    """Writes samples of chosen steps to `<folder>/<step>.jsonl`, in the background; with no folder it writes nothing.

    The texts of a large step take seconds, in which the other ranks would wait for this one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._pending: Future[None] | None = None

    def write(self, samples: Sequence[Sample], *, step: int) -> None:
        """One line per sample: prompt, response, reward and what it was compared with.

        Raises:
            OSError: the samples before these could not be written.
        """
        if self._folder is None:
            return
        self._finish()
        self._pending = self._thread.submit(_write, self._folder / f"{step}.jsonl", _without_experts(samples), step)

    def close(self) -> None:
        """Wait for the last samples; raises as `write` does."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _without_experts(samples: Sequence[Sample]) -> list[Sample]:
    """One view of a rollout's experts would keep all of them in memory until the file is written."""
    return [replace(sample, generation=replace(sample.generation, routed_experts=None)) for sample in samples]


def _write(path: Path, samples: Sequence[Sample], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(_row(sample, step), ensure_ascii=False, default=str) + "\n")


def _row(sample: Sample, step: int) -> dict[str, object]:
    return {
        "step": step,
        "uid": sample.prompt.uid,
        "data_source": sample.prompt.data_source,
        "messages": sample.prompt.messages,
        "response": sample.response_text,
        **({"turns": sample.turns} if sample.turns else {}),
        "ground_truth": sample.prompt.ground_truth,
        "reward": sample.reward,
        "reward_info": sample.reward_info,
        "finish_reason": sample.generation.finish_reason,
        "weight_version": sample.generation.weight_version,
    }
