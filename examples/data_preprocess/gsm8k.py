"""Write GSM8K as train.parquet and test.parquet in the row format that training reads.

    python examples/data_preprocess/gsm8k.py
    python examples/data_preprocess/gsm8k.py --local_dataset_path ~/gsm8k --local_save_dir ~/data/gsm8k

Without --local_dataset_path the data set comes from the Hugging Face hub. With it, from a local folder that holds the
hub's files (main/train-00000-of-00001.parquet, ...) or any train*/test* parquet, JSON lines or CSV files with the
columns "question" and "answer".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import datasets

from mrl.data.rows import write_rows
from mrl.rewards.gsm8k import DATA_SOURCE, MARKER, extract_marked_answer

INSTRUCTION = f'Work it out step by step. End with a line that holds "{MARKER}" and the final number.'
SPLITS = ("train", "test")
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def build_row(example: dict[str, Any], *, split: str, index: int) -> dict[str, Any]:
    """One row from the hub's columns; raises ValueError if the answer has no final number."""
    ground_truth = extract_marked_answer(example["answer"])
    if ground_truth is None:
        raise ValueError(f"{split} example {index} has no {MARKER!r} with a number in its answer")
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"{example['question']}\n\n{INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth.replace(",", "")},
        "extra_info": {
            "split": split,
            "index": index,
            "question": example["question"],
            "answer": example["answer"],
        },
    }


def load_splits(local_path: Path | None) -> datasets.DatasetDict:
    """Both splits, from the hub or from local files; raises ValueError if they cannot be had."""
    if local_path is not None:
        return _load_local(local_path)
    try:
        return datasets.load_dataset(DATA_SOURCE, "main")
    except Exception as error:
        raise ValueError(
            f"cannot load {DATA_SOURCE} from the hub ({type(error).__name__}: {error}); on a machine without it, copy "
            "the data set there and give its folder as --local_dataset_path"
        ) from error


def _load_local(folder: Path) -> datasets.DatasetDict:
    if not folder.is_dir():
        raise ValueError(f"--local_dataset_path {folder} is not a folder")
    root = folder / "main" if (folder / "main").is_dir() else folder
    for suffix, builder in BUILDERS.items():
        files = {split: sorted(str(path) for path in root.glob(f"{split}*{suffix}")) for split in SPLITS}
        if all(files.values()):
            try:
                return datasets.load_dataset(builder, data_files=files)
            except Exception as error:
                raise ValueError(f"cannot read {files}: {type(error).__name__}: {error}") from error
    raise ValueError(f"{root} holds no train* and test* files of one kind ({', '.join(BUILDERS)})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dataset_path", type=Path, help="folder with the data set's files")
    parser.add_argument("--local_save_dir", type=Path, default=Path("~/data/gsm8k"), help="where the files go")
    arguments = parser.parse_args()
    local_path = arguments.local_dataset_path
    try:
        splits = load_splits(local_path.expanduser() if local_path else None)
        rows = {split: _build_rows(splits, split) for split in SPLITS}
        for split in SPLITS:
            path = arguments.local_save_dir.expanduser() / f"{split}.parquet"
            write_rows(path, rows[split])
            print(f"{path}: {len(rows[split])} rows")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _build_rows(splits: datasets.DatasetDict, split: str) -> list[dict[str, Any]]:
    missing = {"question", "answer"} - set(splits[split].column_names)
    if missing:
        raise ValueError(f"{split} lacks {sorted(missing)}; its columns are {splits[split].column_names}")
    return [build_row(example, split=split, index=index) for index, example in enumerate(splits[split])]


if __name__ == "__main__":
    main()
