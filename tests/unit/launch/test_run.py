"""What is refused before any rank starts."""

from __future__ import annotations

import pytest

from mrl.config.load import load_config
from mrl.launch.run import launch


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_restarts_are_refused_where_each_rank_is_a_task_of_its_own(launcher, tmp_path, monkeypatch, caplog):
    variables = {
        "torchrun": {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_RANK": "0"},
        "slurm": {
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_ID": "1",
            "SLURM_PROCID": "1",
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": "1",
            "SLURM_NODEID": "0",
            "SLURM_STEP_NODELIST": "localhost",
        },
    }[launcher]
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    keys = ("trainer.n_gpus_per_node=2", "trainer.max_restarts=1", "trainer.save_freq=1")
    config = load_config([*keys, f"trainer.default_local_dir={tmp_path}", f"trainer.launcher={launcher}"])
    assert launch(config) == 1
    assert "trainer.max_restarts = 1 cannot act with one task per rank" in caplog.text
    assert "torchrun --max-restarts=1" in caplog.text
