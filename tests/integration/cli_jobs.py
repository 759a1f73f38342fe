"""Runs the training command in a process forked from the preloaded test process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mrl.backends.megatron.preload import preload_megatron
from mrl.backends.sglang.preload import preload_sglang
from mrl.trainer import main_ppo


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed, with line breaks of the terminal's width undone."""

    status: int
    output: str
    seconds: float


class Command:
    """A running training command; its own process group, so that a test can send what a terminal would.

    A context: a test that fails inside leaves none of the command's processes to the tests after it.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        preload_megatron()
        preload_sglang()
        self._log = log
        self._start = time.monotonic()
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=(list(arguments), log))
        self._process.start()
        self.pid = self._process.pid or 0
        self._family = {psutil.Process(self.pid)}

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._family, timeout=10)

    def wait_for(self, pattern: str, *, timeout_s: float = 240.0) -> None:
        """Until the output matches; fails if the command ends first."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.output(), re.DOTALL):
            assert self._process.is_alive(), self.output()
            assert time.monotonic() < deadline, f"{pattern!r} did not appear:\n{self.output()}"
            self.descendants()
            time.sleep(0.05)

    def descendants(self) -> set[psutil.Process]:
        """Every process seen below the command so far."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family |= set(psutil.Process(self.pid).children(recursive=True))
        return self._family

    def find(self, word: str) -> psutil.Process:
        """A running descendant with this word in its name or command line."""
        deadline = time.monotonic() + 10
        while True:
            for process in self.descendants():
                # Processes end while one looks, and those below them are then left out.
                with contextlib.suppress(psutil.NoSuchProcess):
                    if word in " ".join([process.name(), *process.cmdline()]):
                        return process
            assert time.monotonic() < deadline, f"no process named {word!r}:\n{self.output()}"
            time.sleep(0.1)

    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def finish(self, *, timeout_s: float = 280.0) -> Outcome:
        """The outcome, once the command and all that it started are gone."""
        deadline = time.monotonic() + timeout_s
        while self._process.is_alive() and time.monotonic() < deadline:
            self.descendants()
            self._process.join(0.1)
        assert not self._process.is_alive(), f"no end within {timeout_s} s:\n{self.output()}"
        _, alive = psutil.wait_procs(self._family, timeout=30)
        assert not [p for p in alive if _runs(p)], "processes were left behind"
        status = self._process.exitcode
        assert status is not None
        return Outcome(status, self.output(), time.monotonic() - self._start)


def run_command(arguments: Sequence[str], folder: Path, *, during: Callable[[Command], None] | None = None) -> Outcome:
    """Run to the end; nothing may be left behind: no process and no shared memory."""
    before = set(os.listdir("/dev/shm"))
    with Command(arguments, folder / "output.txt") as command:
        if during is not None:
            during(command)
        outcome = command.finish()
    deadline = time.monotonic() + 20
    # Other processes of the machine make files there, too, and soon remove them.
    while left := set(os.listdir("/dev/shm")) - before:
        assert time.monotonic() < deadline, f"shared memory was left behind: {sorted(left)}"
        time.sleep(0.1)
    return outcome


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _run(arguments: list[str], log: Path) -> None:
    os.setpgid(0, 0)
    # Ignored in whatever a shell starts in the background, and inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    # A wide terminal: messages stay on one line.
    os.environ["COLUMNS"] = "1000"
    os._exit(main_ppo.main(arguments))
