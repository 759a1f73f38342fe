"""A run's summary, from its metrics file."""

from __future__ import annotations

import json

from mrl.observability import report


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step, reward, **more):
    return {
        "step": step,
        "reward/mean": reward,
        "rollout/tokens_per_s": 100.0 * step,
        "time/step_s": float(step),
        "time/slowest_rank_ratio": 1.1,
        "time/reshard_s": 0.002,
        "reshard/bytes": 2.0 * 2**20,
        "parity/log_prob_abs_diff_mean": 1e-6 * step,
        **more,
    }


def test_first_last_median_and_worst_by_hand(tmp_path):
    rows = [{"step": 0, "val/reward_mean": 0.1}, row(1, 0.2), row(2, 0.5), row(3, 0.9, **{"val/reward_mean": 0.8})]
    write(tmp_path, rows)
    summary = dict(report.summarize_run(tmp_path, wall_s=61.4))
    assert summary["steps"] == "3"
    assert summary["reward, first -> last step"] == "0.200 -> 0.900"
    assert summary["validation reward"] == "0.100 @0  0.800 @3"
    assert summary["rollout tokens per second"] == "200"
    assert summary["step time"] == "2.000 s"
    assert summary["reshard"] == "2.0 ms, 2.0 MiB"
    assert summary["trainer-engine log-prob difference"] == "3.0e-06"
    assert summary["wall time"] == "61 s"


def test_a_run_that_only_validated_has_a_summary(tmp_path):
    write(tmp_path, [{"step": 0, "val/reward_mean": 0.1}])
    assert dict(report.summarize_run(tmp_path))["steps"] == "0"


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
