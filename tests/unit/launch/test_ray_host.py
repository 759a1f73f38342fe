"""A host's task under its Ray actor: lines, report, stopping, and that it never outlives the actor."""

import signal
import subprocess
import sys
import threading

import psutil
import pytest

from mrl.launch.ray_host import HostActor, TaskEnd, TaskSpec, sort_gpus

ECHO = (
    "import json, os, sys; sys.path[:] = {path!r}; from mrl.launch.ray_task import read_config; "
    "print('read', read_config()); print(os.environ['MRL_NODE_RANK'], os.getcwd(), flush=True); "
    "os.write({report}, json.dumps('too few ranks').encode()); print('no end of line', end='', flush=True); sys.exit(3)"
)
SLEEPING = (
    "import sys, time; sys.path[:] = {path!r}; from mrl.launch.ray_task import read_config; "
    "from mrl.launch.lifeline import end_with_parent; read_config(); end_with_parent(0); "
    "import os; print(os.getpid(), flush=True); time.sleep(600)"
)


@pytest.fixture
def spec(tmp_path):
    return TaskSpec(
        config="trainer:\n  seed: 1\n",
        environment={"MRL_NODE_RANK": "1"},
        folder=str(tmp_path),
        log=str(tmp_path / "logs/host-1.log"),
    )


def split(items):
    """All lines, and the end."""
    *lines, end = items
    return [line for batch in lines for line in batch], end


def test_a_task_gets_its_configuration_and_gives_its_lines_and_its_error(spec, tmp_path):
    lines, end = split(HostActor(ECHO).run(spec))
    assert lines == ["read trainer:", "  seed: 1", "", f"1 {tmp_path}", "no end of line"]
    assert end == TaskEnd(status=3, error="too few ranks")
    assert (tmp_path / "logs/host-1.log").read_text().splitlines() == lines


def test_a_task_that_dies_without_a_word_is_told_by_its_status(spec):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert split(HostActor(killed).run(spec)) == ([], TaskEnd(status=-9, error=None))


def test_output_that_something_else_holds_open_does_not_delay_the_end(spec):
    leaving = "import subprocess, sys; subprocess.Popen(['sleep', '600']); print('done')"
    lines, end = split(HostActor(leaving).run(spec))
    assert (lines, end) == (["done"], TaskEnd(status=0, error=None))


def test_stop_ends_the_task(spec):
    actor = HostActor(SLEEPING)
    stream = actor.run(spec)
    pid = int(next(stream)[0])
    threading.Thread(target=actor.stop).start()
    assert split(stream) == ([], TaskEnd(status=-signal.SIGTERM, error=None))
    assert not psutil.pid_exists(pid)


def test_a_task_does_not_outlive_its_actor(spec):
    actor = (
        "from mrl.launch.ray_host import HostActor, TaskSpec\n"
        f"for lines in HostActor({SLEEPING!r}).run({spec!r}):\n    print(*lines, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", actor], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    task = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    task.wait(timeout=30)


def test_an_actor_finds_a_free_port_below_those_of_the_system():
    port = HostActor().free_port("127.0.0.1")
    assert 15000 <= port < 25000


def test_a_host_keeps_ray_s_address_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("MRL_HOST_ADDRESS", raising=False)
    assert HostActor().address("10.0.0.9", None) == "10.0.0.9"
    with pytest.raises(ValueError, match="no network interface nowhere0"):
        HostActor().address("127.0.0.1", "nowhere0")
    monkeypatch.setenv("MRL_HOST_ADDRESS", "10.1.0.9")
    assert HostActor().address("10.0.0.9", "nowhere0") == "10.1.0.9"


def test_gpus_are_ordered_by_index():
    assert sort_gpus(["10", "2", "GPU-b", "0", "GPU-a"]) == ["0", "2", "10", "GPU-a", "GPU-b"]
