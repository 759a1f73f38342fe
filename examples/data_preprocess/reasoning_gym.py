"""Write procedural reasoning-gym tasks as train.parquet and test.parquet; needs no network.

    python examples/data_preprocess/reasoning_gym.py --tasks leg_counting,countdown --train_size 10000 --seed 1

Every row carries the task's whole entry, so that the package's own verifier scores the responses. The test rows
follow the training rows in the task's sequence; those whose question is also a training question are left out.

A small model that never writes <answer> never earns a reward to learn from: --num_shots puts solved questions before
each one, and --instruction "Give only the final answer between <answer> and </answer>." asks for less.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, this file's folder is on the path, where this file would hide the package of the same name.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import reasoning_gym
from reasoning_gym.factory import DATASETS

from mrl.data.rows import write_rows
from mrl.rewards.reasoning_gym import ENTRY_KEY, PREFIX, encode_entry

INSTRUCTION = "Think first. Then give only the final answer between <answer> and </answer>."


@dataclass(kw_only=True, frozen=True)
class Style:
    """How questions are put."""

    instruction: str = INSTRUCTION
    """Follows every question."""
    num_shots: int = 0
    """Solved questions before each one, the first of the task's sequence."""

    def ask(self, entry: dict[str, Any]) -> dict[str, str]:
        """The user's message."""
        return {"role": "user", "content": f"{entry['question']}\n\n{self.instruction}"}

    def solve(self, entry: dict[str, Any]) -> list[dict[str, str]]:
        """The user's message and the right answer; ValueError for an entry without one."""
        if entry["answer"] is None:
            raise ValueError("this task's entries have no answer to show; use --num_shots 0")
        return [self.ask(entry), {"role": "assistant", "content": f"<answer>{entry['answer']}</answer>"}]


def build_row(
    task: str, entry: dict[str, Any], *, split: str, index: int, prompt: list[dict[str, str]]
) -> dict[str, Any]:
    """One row; raises ValueError if the entry cannot be stored."""
    answer = entry["answer"]
    return {
        "data_source": PREFIX + task,
        "prompt": prompt,
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": None if answer is None else str(answer)},
        "extra_info": {"split": split, "index": index, ENTRY_KEY: encode_entry(entry)},
    }


def build_rows(
    task: str, *, first: int, size: int, seed: int, split: str, style: Style = Style()
) -> list[dict[str, Any]]:
    """Rows `first` to `first + size` after the solved ones of a task's sequence, a pure function of the arguments.

    Raises:
        ValueError: unknown task, a size below 1 or a negative number of shots, or an entry that cannot be stored.
    """
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=5)
        raise ValueError(f"reasoning-gym has no task {task!r}; nearest: {near or sorted(DATASETS)}")
    if size < 1:
        raise ValueError(f"size = {size} must be at least 1")
    if style.num_shots < 0:
        raise ValueError(f"num_shots = {style.num_shots} must not be negative")
    # One sequence for both splits: the package seeds entry i with seed + i, so neighbouring seeds share entries.
    entries = reasoning_gym.create_dataset(task, size=style.num_shots + first + size, seed=seed)
    shots = [message for index in range(style.num_shots) for message in style.solve(entries[index])]
    asked = (entries[style.num_shots + first + index] for index in range(size))
    return [
        build_row(task, entry, split=split, index=index, prompt=[*shots, style.ask(entry)])
        for index, entry in enumerate(asked)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="leg_counting", help="task names, separated by commas")
    parser.add_argument("--train_size", type=int, default=10000, help="training rows of each task")
    parser.add_argument("--test_size", type=int, default=200, help="test rows of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num_shots", type=int, default=0, help="solved questions before each one")
    parser.add_argument("--instruction", default=INSTRUCTION, help="follows every question")
    parser.add_argument("--local_save_dir", type=Path, default=Path("~/data/reasoning_gym"))
    arguments = parser.parse_args()
    try:
        _write_splits(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _write_splits(arguments: argparse.Namespace) -> None:
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    style = Style(instruction=arguments.instruction, num_shots=arguments.num_shots)
    for task in arguments.tasks.split(","):
        train_size, test_size, seed = arguments.train_size, arguments.test_size, arguments.seed
        train += build_rows(task, first=0, size=train_size, seed=seed, split="train", style=style)
        test += build_rows(task, first=train_size, size=test_size, seed=seed, split="test", style=style)
    seen = {row["prompt"][-1]["content"] for row in train}
    fresh = [row for row in test if row["prompt"][-1]["content"] not in seen]
    if not fresh:
        raise ValueError("every test question is also a training question; use fewer training rows")
    for name, rows in (("train", train), ("test", fresh)):
        path = arguments.local_save_dir.expanduser() / f"{name}.parquet"
        write_rows(path, rows)
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
