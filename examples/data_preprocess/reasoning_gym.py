"""Write procedural reasoning-gym tasks as train.parquet and test.parquet; needs no network.

    python examples/data_preprocess/reasoning_gym.py --tasks leg_counting,countdown --train_size 10000 --seed 1

Every row carries the task's whole entry, so that the package's own verifier scores the responses. The test rows
follow the training rows in the task's sequence; those whose question is also a training question are left out.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

# Run as a script, this file's folder is on the path, where this file would hide the package of the same name.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import reasoning_gym
from reasoning_gym.factory import DATASETS

from mrl.data.rows import write_rows
from mrl.rewards.reasoning_gym import ENTRY_KEY, PREFIX, encode_entry

INSTRUCTION = "Think first. Then give only the final answer between <answer> and </answer>."


def build_row(task: str, entry: dict[str, Any], *, split: str, index: int) -> dict[str, Any]:
    """One row; raises ValueError if the entry cannot be stored."""
    answer = entry["answer"]
    return {
        "data_source": PREFIX + task,
        "prompt": [{"role": "user", "content": f"{entry['question']}\n\n{INSTRUCTION}"}],
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": None if answer is None else str(answer)},
        "extra_info": {"split": split, "index": index, ENTRY_KEY: encode_entry(entry)},
    }


def build_rows(task: str, *, first: int, size: int, seed: int, split: str) -> list[dict[str, Any]]:
    """Rows `first` to `first + size` of a task's sequence for `seed`, a pure function of the arguments.

    Raises:
        ValueError: unknown task, a size below 1, or an entry that cannot be stored.
    """
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=5)
        raise ValueError(f"reasoning-gym has no task {task!r}; nearest: {near or sorted(DATASETS)}")
    if size < 1:
        raise ValueError(f"size = {size} must be at least 1")
    # One sequence for both splits: the package seeds entry i with seed + i, so neighbouring seeds share entries.
    entries = reasoning_gym.create_dataset(task, size=first + size, seed=seed)
    return [build_row(task, entries[first + index], split=split, index=index) for index in range(size)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="leg_counting", help="task names, separated by commas")
    parser.add_argument("--train_size", type=int, default=10000, help="training rows of each task")
    parser.add_argument("--test_size", type=int, default=200, help="test rows of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--local_save_dir", type=Path, default=Path("~/data/reasoning_gym"))
    arguments = parser.parse_args()
    try:
        _write_splits(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _write_splits(arguments: argparse.Namespace) -> None:
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for task in arguments.tasks.split(","):
        train_size, test_size, seed = arguments.train_size, arguments.test_size, arguments.seed
        train += build_rows(task, first=0, size=train_size, seed=seed, split="train")
        test += build_rows(task, first=train_size, size=test_size, seed=seed, split="test")
    seen = {row["prompt"][0]["content"] for row in train}
    fresh = [row for row in test if row["prompt"][0]["content"] not in seen]
    if not fresh:
        raise ValueError("every test question is also a training question; use fewer training rows")
    for name, rows in (("train", train), ("test", fresh)):
        path = arguments.local_save_dir.expanduser() / f"{name}.parquet"
        write_rows(path, rows)
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
