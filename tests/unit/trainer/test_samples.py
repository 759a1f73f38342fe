"""Samples as metrics and as files."""

from __future__ import annotations

import json

import pytest

from mrl.trainer.samples import SampleWriter, summarize_samples
from mrl.types import Generation, Prompt, Sample


def sample(reward, length, *, reason="stop", version=3, info=None):
    generation = Generation(
        response_ids=list(range(length)),
        rollout_log_probs=[-1.0] * length,
        finish_reason=reason,
        weight_version=version,
    )
    prompt = Prompt(uid="file:0", token_ids=[1, 2], messages=[{"role": "user", "content": "1 +"}], data_source="task")
    return Sample(prompt=prompt, generation=generation, response_text="x", reward=reward, reward_info=info or {})


def test_the_summary_of_three_samples_by_hand():
    samples = [
        sample(1.0, 2, info={"format": 1.0, "reward/failed": 0.0}),
        sample(0.0, 4, reason="length", version=2),
        sample(0.5, 3, info={"format": 0.5}),
    ]
    assert summarize_samples(samples) == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/min": 0.0,
            "reward/max": 1.0,
            "reward/format": 0.75,
            "reward/failed": 0.0,
            "response/length_mean": 3.0,
            "response/length_max": 4.0,
            "response/truncated_fraction": 1 / 3,
            "prompt/length_mean": 2.0,
            "rollout/weight_version": 2.0,
        }
    )


def test_a_step_is_one_file_with_a_line_per_sample(tmp_path):
    writer = SampleWriter(tmp_path / "train")
    writer.write([sample(1.0, 2), sample(0.0, 1)], step=7)
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "train/7.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [1.0, 0.0]
    assert rows[0]["messages"] == [{"role": "user", "content": "1 +"}]
    assert rows[0]["weight_version"] == 3


def test_a_writer_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SampleWriter(None).write([sample(1.0, 2)], step=1)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_cannot_be_written_end_the_next_step_with_the_system_s_reason(tmp_path):
    (tmp_path / "train").write_text("not a folder")
    writer = SampleWriter(tmp_path / "train")
    writer.write([sample(1.0, 2)], step=1)
    with pytest.raises(FileExistsError, match="train"):
        writer.write([sample(1.0, 2)], step=2)
    writer.close()
