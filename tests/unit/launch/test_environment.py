"""Which launcher started this process, and what it says of the rank."""

from dataclasses import replace

import pytest

from mrl.launch.environment import detect_launcher, host_environments, read_task
from mrl.launch.slurm import first_of_hostlist
from mrl.launch.task import Task

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[008-009]",
}
HOST = {
    "MRL_NODE_RANK": "1",
    "MRL_NNODES": "2",
    "MRL_HOST_ADDRESS": "fd00::2",
    "MASTER_ADDR": "fd00::1",
    "MASTER_PORT": "4000",
}


def test_launchers_are_told_apart_by_their_variables():
    assert detect_launcher("auto", {}) == "local"
    assert detect_launcher("auto", TORCHRUN) == "torchrun"
    assert detect_launcher("auto", SLURM) == "slurm"
    assert detect_launcher("auto", SLURM | {"SLURM_NTASKS": "1"}) == "local"
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert detect_launcher("auto", batch_script) == "local"
    assert detect_launcher("local", TORCHRUN) == "local"
    assert detect_launcher("auto", {"RAY_ADDRESS": "10.0.0.1:6379"}) == "ray"
    assert detect_launcher("auto", {"RAY_JOB_ID": "01000000"}) == "ray"
    assert detect_launcher("auto", {"RAY_ADDRESS": "http://10.0.0.1:8265"}) == "local"
    assert detect_launcher("auto", {"RAY_ADDRESS": "10.0.0.1:6379"} | SLURM) == "slurm"
    assert detect_launcher("ray", {}) == "ray"
    assert {detect_launcher(name, HOST | TORCHRUN) for name in ("auto", "ray", "torchrun")} == {"host"}


def test_a_forced_launcher_without_its_variables_is_refused():
    with pytest.raises(ValueError, match="TORCHELASTIC_RUN_ID is not set"):
        detect_launcher("torchrun", {})
    with pytest.raises(ValueError, match="SLURM_PROCID is not set"):
        detect_launcher("slurm", {})
    with pytest.raises(ValueError, match="not one of"):
        detect_launcher("mpi", {})


def test_torchrun_and_slurm_describe_the_same_task():
    expected = Task(index=5, count=8, local_index=1, node_rank=1, master_addr="10.0.0.1", master_port=29500)
    assert read_task("torchrun", TORCHRUN) == replace(expected, agent_store=True)
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert read_task("slurm", SLURM | given) == expected


def test_srun_alone_says_where_the_first_host_is():
    task = read_task("slurm", SLURM)
    assert (task.master_addr, task.master_port) == ("gpu008", 15000 + 1234 * 13 + 2 - 10000)
    beside = read_task("slurm", SLURM | {"SLURM_STEP_ID": "3"})
    assert beside.master_port != task.master_port
    with pytest.raises(ValueError, match="export MASTER_ADDR"):
        read_task("slurm", {name: value for name, value in SLURM.items() if "NODELIST" not in name})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[3,5-7]", "gpu3"),
        ("rack[1-2]-node[04-05]", "rack1-node04"),
        ("a.b.c,d", "a.b.c"),
    ],
)
def test_the_first_of_a_host_list(hosts, first):
    assert first_of_hostlist(hosts) == first


def test_a_driver_names_a_host_and_its_address():
    task = read_task("host", HOST)
    assert task == Task(
        index=1,
        count=2,
        local_index=0,
        node_rank=1,
        master_addr="fd00::1",
        master_port=4000,
        host_address="fd00::2",
        owns_host=True,
    )
    assert task.runs_host(num_nodes=2, ranks_per_node=1)


def test_missing_variables_are_named():
    with pytest.raises(ValueError, match="did not set LOCAL_RANK, MASTER_PORT"):
        read_task("torchrun", {k: v for k, v in TORCHRUN.items() if k not in ("LOCAL_RANK", "MASTER_PORT")})


def test_a_task_is_a_rank_or_a_host():
    rank = read_task("torchrun", TORCHRUN)
    assert not rank.runs_host(num_nodes=2, ranks_per_node=4)
    host = read_task("torchrun", TORCHRUN | {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"})
    assert host.runs_host(num_nodes=2, ranks_per_node=4)
    assert not host.runs_host(num_nodes=2, ranks_per_node=1)
    with pytest.raises(ValueError, match=r"started 8 tasks; .* needs 12 \(one per rank\) or 3 \(one per host\)"):
        rank.runs_host(num_nodes=3, ranks_per_node=4)


def test_tasks_dealt_out_in_turn_are_refused():
    cyclic = read_task("slurm", SLURM | {"SLURM_PROCID": "3"})
    with pytest.raises(ValueError, match="distribution=block"):
        cyclic.runs_host(num_nodes=2, ranks_per_node=4)


def test_ranks_are_numbered_host_by_host():
    ranks = host_environments(
        num_nodes=3, ranks_per_node=2, master_addr="a", master_port=1, node_rank=1, host_address="b"
    )
    assert [(rank.rank, rank.local_rank, rank.node_rank, rank.host_address) for rank in ranks] == [
        (2, 0, 1, "b"),
        (3, 1, 1, "b"),
    ]
    assert {(rank.world_size, rank.local_world_size) for rank in ranks} == {(6, 2)}
