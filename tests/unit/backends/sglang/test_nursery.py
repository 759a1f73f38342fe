"""Processes forked by a helper for a process that has threads."""

import logging
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

import pytest

from mrl.backends.sglang.nursery import Nursery
from mrl.launch.fork import run_ranks


def alone(scenario):
    """Run `scenario` in a forked process, which has one thread whatever tests before this one have left here."""
    run_ranks(lambda env: scenario(), 1, timeout_s=60)


def with_nursery(scenario):
    """Run `scenario(nursery)` alone."""

    def main():
        nursery = Nursery()
        try:
            scenario(nursery)
        finally:
            nursery.close()

    alone(main)


def send_facts(pipe, *, label):
    pipe.send((label, os.environ.get("MRL_TEST_NURSERY"), threading.active_count(), os.getppid()))


def wait_for_release(pipe):
    pipe.recv()


def leave(status):
    raise SystemExit(status)


def start(nursery, target, *args, **kwargs):
    process = nursery.Process(target=target, args=args, kwargs=kwargs)
    process.start()
    return process


def test_a_process_gets_its_arguments_a_pipe_and_the_environment_of_its_start(monkeypatch):
    def scenario(nursery):
        monkeypatch.setenv("MRL_TEST_NURSERY", "now")
        reader, writer = multiprocessing.Pipe(duplex=False)
        # A thread that would be missing in a child forked from here.
        release = threading.Event()
        thread = threading.Thread(target=release.wait)
        thread.start()
        try:
            process = start(nursery, send_facts, writer, label="first")
            label, variable, threads, parent = reader.recv()
        finally:
            release.set()
            thread.join()
        process.join()
        assert (label, variable, threads) == ("first", "now", 1)
        assert parent not in (os.getpid(), process.pid)
        assert (process.exitcode, process.is_alive()) == (0, False)

    with_nursery(scenario)


def test_ends_are_reported_as_multiprocessing_does():
    def scenario(nursery):
        reader, writer = multiprocessing.Pipe(duplex=False)
        running = start(nursery, wait_for_release, reader)
        assert (running.exitcode, running.is_alive()) == (None, True)
        running.join(0.01)
        assert running.is_alive()
        os.kill(running.pid, signal.SIGKILL)
        assert wait([running.sentinel]) == [running.sentinel]
        assert running.exitcode == -signal.SIGKILL
        left = start(nursery, leave, 3)
        left.join()
        assert left.exitcode == 3
        writer.close()

    with_nursery(scenario)


def test_a_closed_pipe_tells_of_a_childs_end():
    def scenario(nursery):
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = start(nursery, leave, 1)
        other = start(nursery, send_facts, writer, label="only")
        writer.close()
        process.join()
        other.join()
        assert reader.recv()[0] == "only"
        with pytest.raises(EOFError):
            reader.recv()

    with_nursery(scenario)


def test_closing_ends_all_it_forked():
    def scenario():
        nursery = Nursery()
        reader, _writer = multiprocessing.Pipe(duplex=False)
        process = start(nursery, wait_for_release, reader)
        nursery.close()
        nursery.close()
        process.join()
        assert not process.is_alive()
        with pytest.raises(ChildProcessError):
            start(nursery, leave, 0)

    alone(scenario)


def test_a_process_with_threads_is_warned_of():
    def scenario():
        release = threading.Event()
        thread = threading.Thread(target=release.wait, name="busy")
        thread.start()
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logging.getLogger("mrl.backends.sglang.nursery").addHandler(handler)
        try:
            Nursery().close()
        finally:
            release.set()
            thread.join()
        [message] = messages
        assert "threads (MainThread, busy)" in message

    alone(scenario)
