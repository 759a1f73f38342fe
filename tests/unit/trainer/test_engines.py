"""Which ranks start which part of an engine."""

from types import SimpleNamespace

import pytest

from mrl.launch.environment import host_environments
from mrl.trainer.engines import engine_part, part_gpus


def parts(*, hosts, ranks_per_host, tp, num_engines):
    """(rank, engine, host of the engine, hosts of the engine) for each rank that starts a part."""
    found = []
    for host in range(hosts):
        for env in host_environments(
            num_nodes=hosts, ranks_per_node=ranks_per_host, master_addr="a", master_port=1, node_rank=host
        ):
            part = engine_part(SimpleNamespace(rollout_tp=tp, num_engines=num_engines), env)
            if part is not None:
                found.append((env.rank, part.name, part.host_index, part.num_hosts))
                assert part.leads == (part.host_index == 0)
    return found


def test_an_engine_within_a_host_is_started_by_its_first_rank():
    assert parts(hosts=2, ranks_per_host=4, tp=2, num_engines=3) == [
        (0, "engine/0/0", 0, 1),
        (2, "engine/0/1", 0, 1),
        (4, "engine/0/2", 0, 1),
    ]


def test_an_engine_over_hosts_is_started_by_the_first_rank_on_each():
    assert parts(hosts=4, ranks_per_host=2, tp=4, num_engines=2) == [
        (0, "engine/0/0", 0, 2),
        (2, "engine/0/0", 1, 2),
        (4, "engine/0/1", 0, 2),
        (6, "engine/0/1", 1, 2),
    ]
    assert [rank for rank, *_ in parts(hosts=4, ranks_per_host=2, tp=4, num_engines=1)] == [0, 2]


@pytest.mark.parametrize(("ranks_per_host", "started"), [(1, [0, 1, 2, 3]), (4, [0])])
def test_hosts_of_any_size(ranks_per_host, started):
    assert [rank for rank, *_ in parts(hosts=4, ranks_per_host=ranks_per_host, tp=4, num_engines=1)] == started


def test_a_part_runs_on_its_ranks_gpus_in_the_engines_order():
    plan = SimpleNamespace(device="cuda", rollout_tp=4, num_engines=2, beside=(0, 2, 1, 3, 5, 4, 7, 6))
    for hosts, expected in ((1, {0: (0, 2, 1, 3), 4: (5, 4, 7, 6)}), (2, {0: (0, 2, 1, 3), 4: (1, 0, 3, 2)})):
        found = {}
        for host in range(hosts):
            for env in host_environments(
                num_nodes=hosts, ranks_per_node=8 // hosts, master_addr="a", master_port=1, node_rank=host
            ):
                if engine_part(plan, env) is not None:
                    found[env.rank] = part_gpus(plan, env)
        assert found == expected
    assert part_gpus(SimpleNamespace(device="cpu"), env) == ()
