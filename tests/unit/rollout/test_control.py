"""Where engines of several hosts meet, what each is told, and what becomes of a failed update."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from reshard_cases import make_spec

from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.reshard.layout import SourceRank, sources_from_json
from mrl.rollout.control import UpdateControl
from mrl.rollout.queue import job_store

SPEC = make_spec()


def source(rank, host, device=-1):
    return SourceRank(rank=rank, tp_rank=0, tp_size=1, host=host, device=device, dtype="float32", buffers=(), params=())


def controls(scenario, hosts, engine_sizes, devices=None, **settings):
    """What `scenario(control)` returns on a rank for each of the hosts."""
    known = devices or [-1] * len(hosts)
    sources = [source(rank, host, device) for rank, (host, device) in enumerate(zip(hosts, known, strict=True))]
    settings["timeout_s"] = 9.0

    def rank_main(env):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=60))
        result = scenario(UpdateControl(SPEC, sources, engine_sizes, rank=env.rank, **settings))
        dist.destroy_process_group()
        return result

    return sources, run_ranks(rank_main, len(hosts), timeout_s=60)


def test_engines_are_told_where_all_of_them_are_and_where_to_meet():
    sources, messages = controls(lambda control: control.message, ["a", "a", "b", "b"], {0: 1, 2: 2})
    assert messages[1] == messages[3] == {}
    for rank, first in ((0, 0), (2, 1)):
        engines = messages[rank]["engines"]
        assert (engines["hosts"], engines["first_rank"]) == (["a", "b", "b"], first)
        assert engines["meeting"]["timeout_s"] == 9.0
        assert sources_from_json(messages[rank]["sources"]) == sources
        assert engines["devices"] == [-1, -1, -1]
        assert not engines["copy_engines"]
    assert messages[0]["engines"]["meeting"] == messages[2]["engines"]["meeting"]


@pytest.mark.parametrize(
    ("devices", "engine_sizes", "expected"),
    [
        ([16, 32, 16, 32], {0: 4}, [16, 32, 16, 32]),
        ([16, 32, 16, 32], {0: 2}, [16, 32]),
        ([16, 32, 48, 64], {0: 1, 2: 2}, [16, 48, 64]),
        # Two trainer ranks on each GPU, with an engine beside the first of them.
        ([16, 16, 32, 32], {0: 1, 2: 1}, [16, 32]),
    ],
)
def test_engines_are_told_the_devices_of_all_their_ranks(devices, engine_sizes, expected):
    _, messages = controls(lambda control: control.message, ["a", "a", "b", "b"], engine_sizes, devices)
    assert all(messages[leader]["engines"]["devices"] == expected for leader in engine_sizes)


def test_engines_are_told_the_order_in_which_their_ranks_lie_on_devices():
    placed = {"beside": [0, 1, 3, 2], "copy_engines": True}
    _, messages = controls(lambda control: control.message, ["a", "a", "b", "b"], {0: 4}, [16, 32, 48, 64], **placed)
    engines = messages[0]["engines"]
    assert (engines["hosts"], engines["devices"]) == (["a", "a", "b", "b"], [16, 32, 64, 48])
    assert engines["copy_engines"]


def test_engines_of_one_host_meet_nowhere():
    _, messages = controls(lambda control: control.message, ["a", "a"], {0: 1, 1: 1})
    assert all("meeting" not in message["engines"] for message in messages)


def test_who_gives_up_is_read_at_the_meeting_and_the_next_one_is_elsewhere():
    def scenario(control):
        first = control.message["engines"]["meeting"]["name"]
        assert control.message is control.message
        if dist.get_rank() == 1:
            control.give_up("3.0", "engine b is busy")
            control.give_up("3.0", "and again")
        dist.barrier()
        read = [job_store().get(f"{first}/3.0/{key}").decode() for key in ("verdict", "failure")]
        control.renew()
        return read, first != control.message["engines"]["meeting"]["name"]

    _, results = controls(scenario, ["a", "b"], {0: 1, 1: 1})
    assert results == [(["engine b is busy"] * 2, True)] * 2
