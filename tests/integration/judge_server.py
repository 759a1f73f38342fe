"""A judge served by SGLang in a process forked from the preloaded test process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
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
    preload_megatron()
    preload_sglang()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = set(os.listdir("/dev/shm"))
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(str(model), str(port), log, token))
    process.start()
    family = [psutil.Process(process.pid)]
    try:
        _wait_ready(f"http://127.0.0.1:{port}/v1/models", token, process, log)
        family += family[0].children(recursive=True)
        assert all(map(is_loopback, listening(family))), listening(family)
        yield f"http://127.0.0.1:{port}/v1"
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not [relative for relative in alive if relative.status() != psutil.STATUS_ZOMBIE], log.read_text()
        left = set(os.listdir("/dev/shm")) - before
        assert not left, f"shared memory was left behind: {sorted(left)}"
    finally:
        for relative in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.kill()
        process.join(10)


def _serve(model: str, port: str, log: Path, token: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
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
