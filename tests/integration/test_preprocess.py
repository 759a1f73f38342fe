"""The scripts that write datasets: reproducible rows that their own verifiers accept, and clear refusals."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrl.data.rows import read_rows
from mrl.rewards.rules import compute_score

SCRIPTS = Path(__file__).parents[2] / "examples" / "data_preprocess"


def run_script(name, *arguments, home):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def write_hub_files(folder, train, test):
    folder.mkdir(parents=True)
    for split, rows in (("train", train), ("test", test)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def test_gsm8k_from_the_hub_s_files(tmp_path):
    example = {"question": "Two twos?", "answer": "2 * 2 = <<2*2=4>>4\n#### 4"}
    large = {"question": "Many?", "answer": "so\n#### 1,200"}
    write_hub_files(tmp_path / "hub" / "main", [example, large], [large])
    result = run_script(
        "gsm8k.py", "--local_dataset_path", tmp_path / "hub", "--local_save_dir", tmp_path / "out", home=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    first, second = read_rows(str(tmp_path / "out" / "train.parquet"))
    assert (first.data_source, first.ground_truth, second.ground_truth) == ("openai/gsm8k", "4", "1200")
    assert first.prompt[0]["role"] == "user"
    assert first.prompt[0]["content"].startswith("Two twos?")
    assert first.extra_info == {"split": "train", "index": 0, **example}
    assert compute_score(second.data_source, large["answer"], second.ground_truth, second.extra_info) == 1.0
    assert len(read_rows(str(tmp_path / "out" / "test.parquet"))) == 1


def test_gsm8k_says_what_is_wrong_and_writes_nothing(tmp_path):
    write_hub_files(
        tmp_path / "bad", [{"question": "q", "answer": "no number"}], [{"question": "q", "answer": "#### 1"}]
    )
    result = run_script(
        "gsm8k.py", "--local_dataset_path", tmp_path / "bad", "--local_save_dir", tmp_path / "out", home=tmp_path
    )
    assert result.returncode == 1
    assert "error: train example 0 has no '####'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def reasoning_gym_script():
    specification = importlib.util.spec_from_file_location("reasoning_gym_script", SCRIPTS / "reasoning_gym.py")
    script = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up.
    sys.modules[specification.name] = script
    specification.loader.exec_module(script)
    yield script
    del sys.modules[specification.name]


def test_reasoning_gym_rows_are_reproducible_and_verifiable(tmp_path, reasoning_gym_script):
    arguments = ("--tasks", "leg_counting,countdown", "--train_size", 3, "--test_size", 2, "--seed", 4)
    result = run_script("reasoning_gym.py", *arguments, "--local_save_dir", tmp_path, home=tmp_path)
    assert result.returncode == 0, result.stderr
    questions = set()
    for split, first, size in (("train", 0, 3), ("test", 3, 2)):
        rows = read_rows(str(tmp_path / f"{split}.parquet"))
        questions |= {row.prompt[0]["content"] for row in rows}
        again = []
        for task in ("leg_counting", "countdown"):
            again += reasoning_gym_script.build_rows(task, first=first, size=size, seed=4, split=split)
        assert [row.data_source for row in rows] == [row["data_source"] for row in again]
        assert [row.prompt for row in rows] == [row["prompt"] for row in again]
        assert [row.extra_info for row in rows] == [row["extra_info"] for row in again]
        for row in rows:
            assert json.loads(row.extra_info["entry"])["question"] in row.prompt[0]["content"]
            right = f"<answer>{row.ground_truth}</answer>"
            assert compute_score(row.data_source, right, row.ground_truth, row.extra_info) == 1.0
    assert len(questions) == 10, "test questions must not be training questions"


def test_reasoning_gym_shows_solved_questions_that_are_asked_nowhere(reasoning_gym_script):
    style = reasoning_gym_script.Style(instruction="Answer in tags.", num_shots=2)
    rows = reasoning_gym_script.build_rows("letter_counting", first=1, size=3, seed=7, split="train", style=style)
    plain = reasoning_gym_script.build_rows("letter_counting", first=0, size=6, seed=7, split="train")
    solved = [(row["extra_info"]["entry"], row["reward_model"]["ground_truth"]) for row in plain[:2]]
    for row, same in zip(rows, plain[3:], strict=True):
        *shots, question = row["prompt"]
        assert [message["role"] for message in shots] == ["user", "assistant"] * 2
        for (entry, answer), asked, answered in zip(solved, shots[::2], shots[1::2], strict=True):
            assert asked["content"] == f"{json.loads(entry)['question']}\n\nAnswer in tags."
            assert answered["content"] == f"<answer>{answer}</answer>"
        assert question["content"].startswith(json.loads(same["extra_info"]["entry"])["question"])
        assert row["reward_model"] == same["reward_model"]


@pytest.mark.parametrize(
    ("task", "size", "complaint"),
    [("leg_count", 1, r"no task 'leg_count'; nearest: \['leg_counting'"), ("leg_counting", 0, "size = 0")],
)
def test_reasoning_gym_refuses_what_it_cannot_make(reasoning_gym_script, task, size, complaint):
    with pytest.raises(ValueError, match=complaint):
        reasoning_gym_script.build_rows(task, first=0, size=size, seed=1, split="train")
