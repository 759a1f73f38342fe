"""How an engine's processes meet, and how its hosts tell each other of a failure."""

from datetime import timedelta

import torch.distributed as dist

from mrl.backends.sglang.parts import EnginePart, FailureBoard, register_rendezvous
from mrl.launch.fork import run_ranks

TIMEOUT = timedelta(seconds=60)


def part_of(env, *, name="engine/0", host_index=0):
    return EnginePart(
        name=name, store_host=env.master_addr, store_port=env.master_port, num_hosts=2, host_index=host_index
    )


def test_sglang_is_told_of_hosts_only_where_there_are_several():
    alone = EnginePart(name="engine/0", store_host="fd00::1", store_port=4000)
    assert alone.server_args() == {}
    second = EnginePart(name="engine/0", store_host="fd00::1", store_port=4000, num_hosts=2, host_index=1)
    assert second.server_args() == {"nnodes": 2, "node_rank": 1, "dist_init_addr": "[fd00::1]:4000"}
    address = second.environment(start=3)["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"]
    assert address == "mrl-store://[fd00::1]:4000/engine/0"


def test_processes_of_each_start_of_each_engine_meet_each_other_only(monkeypatch):
    def main(env):
        register_rendezvous()
        seen = []
        for start in range(2):
            environment = part_of(env, name=f"engine/{env.rank // 2}").environment(start=start)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            address = environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"]
            dist.init_process_group("gloo", init_method=address, rank=env.rank % 2, world_size=2, timeout=TIMEOUT)
            ranks = [None, None]
            dist.all_gather_object(ranks, (env.rank, start))
            seen.append(ranks)
            dist.destroy_process_group()
        return seen

    low, high = [[(0, 0), (1, 0)], [(0, 1), (1, 1)]], [[(2, 0), (3, 0)], [(2, 1), (3, 1)]]
    assert run_ranks(main, 4, timeout_s=120) == [low, low, high, high]


def test_a_failure_is_read_by_the_other_hosts_until_the_next_start():
    def main(env):
        boards = [FailureBoard(part_of(env, host_index=index), timeout=TIMEOUT) for index in range(2)]
        before = boards[0].read()
        boards[1].post("no cores")
        seen, own = boards[0].read_soon(), boards[1].read()
        boards[0].start = 1
        return before, [text.split(": ", 1)[1] for text in seen], own, boards[0].read()

    assert run_ranks(main, 1, timeout_s=120) == [([], ["no cores"], [], [])]
