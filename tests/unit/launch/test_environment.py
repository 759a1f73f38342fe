"""Which launcher started this process, and what it says of the rank."""

import pytest

from mrl.launch.environment import RankEnvironment, detect_launcher, read_environment

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_launchers_are_told_apart_by_their_variables():
    assert detect_launcher("auto", {}) == "local"
    assert detect_launcher("auto", TORCHRUN) == "torchrun"
    assert detect_launcher("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == "slurm"
    assert detect_launcher("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == "local"
    assert detect_launcher("local", TORCHRUN) == "local"


def test_a_forced_launcher_without_its_variables_is_refused():
    with pytest.raises(ValueError, match="TORCHELASTIC_RUN_ID is not set"):
        detect_launcher("torchrun", {})
    with pytest.raises(ValueError, match="SLURM_PROCID is not set"):
        detect_launcher("slurm", {})
    with pytest.raises(ValueError, match="not one of"):
        detect_launcher("mpi", {})


def test_torchrun_and_slurm_describe_the_same_rank():
    expected = RankEnvironment(
        rank=5, local_rank=1, world_size=8, local_world_size=4, master_addr="10.0.0.1", master_port=29500
    )
    assert read_environment("torchrun", TORCHRUN) == expected
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4(x2)",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }
    assert read_environment("slurm", slurm) == expected


def test_missing_variables_are_named():
    with pytest.raises(ValueError, match="did not set LOCAL_RANK, MASTER_PORT"):
        read_environment("torchrun", {k: v for k, v in TORCHRUN.items() if k not in ("LOCAL_RANK", "MASTER_PORT")})
