"""A judge served by SGLang in a process forked from the preloaded test process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from listening import is_loopback, listening

from mrl.backends.megatron.preload import preload_megatron
from mrl.backends.sglang import server
from mrl.backends.sglang.preload import preload_sglang


@contextmanager
def served_judge(model: Path, log: Path, *, token: str = "") -> Iterator[str]:
    """Serve a model folder; yields the URL for `reward.judge.url`. Nothing of it is left when the block ends.

    Args:
        token: that requests need; without one they need none.
    """
    with forked_judge(model, log, token=token) as (process, port, files):
        _wait_ready(f"http://127.0.0.1:{port}/v1/models", token, process, log)
        family = family_of(process)
        assert all(map(is_loopback, listening(family))), listening(family)
        yield f"http://127.0.0.1:{port}/v1"
        os.kill(process.pid, signal.SIGTERM)
        expect_nothing_left(family, files, log)


@contextmanager
def forked_judge(
    model: Path, log: Path, *, token: str = ""
) -> Iterator[tuple[multiprocessing.Process, int, Callable[[], set[str]]]]:
    """A starting server, its port and what lists its files; its processes are killed when the block ends."""
    preload_megatron()
    preload_sglang()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as folder:

        def files() -> set[str]:
            return (set(os.listdir("/dev/shm")) - before) | set(os.listdir(folder))

        main = multiprocessing.get_context("fork").Process(
            target=_serve, args=(str(model), str(port), log, token, folder)
        )
        main.start()
        try:
            yield main, port, files
        finally:
            for relative in family_of(main):
                relative.kill()
            main.join(10)


def family_of(process: multiprocessing.Process) -> list[psutil.Process]:
    """The process and all that descend from it."""
    try:
        main = psutil.Process(process.pid)
        return [main, *main.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def expect_nothing_left(family: list[psutil.Process], files: Callable[[], set[str]], log: Path) -> None:
    """Wait for the server's processes to end and its files to go.

    Raises:
        AssertionError: one is left after a minute.
    """
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [relative for relative in alive if relative.status() != psutil.STATUS_ZOMBIE], log.read_text()
    deadline = time.monotonic() + 10
    while left := files():
        assert time.monotonic() < deadline, f"left behind: {sorted(left)}"
        time.sleep(0.05)


def _serve(model: str, port: str, log: Path, token: str, folder: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    tempfile.tempdir = folder
    os.environ["JUDGE_TOKEN"] = token
    os._exit(server.main([model, "--port", port, *(["--api-key-env", "JUDGE_TOKEN"] if token else [])]))


def _wait_ready(url: str, token: str, process: multiprocessing.Process, log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except (urllib.error.URLError, ConnectionError):
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
