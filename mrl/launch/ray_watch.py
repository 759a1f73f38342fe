"""Following the tasks of a job's hosts: their lines, the first error, and an end for all of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mrl.launch.board import is_echo
from mrl.launch.ray_cluster import Host
from mrl.launch.ray_host import TaskEnd, TaskSpec
from mrl.observability.console import CONSOLE

_ECHO_S = 15.0
"""How long after one host has lost its connections another may need to say why."""
_STOP_S = 30.0
"""For all tasks to stop their ranks and end; twice what one has."""
_TAIL_LINES = 25
_INSTALL = "mrl has to be installed on every node, in the Python that Ray's workers have, or come with the runtime_env"


class HostTask:
    """One host's task, as the driver sees it."""

    def __init__(self, host: Host, actor: Any, spec: TaskSpec) -> None:
        self.host = host
        self.actor = actor
        self.spec = spec
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._end: TaskEnd | None = None
        self._stream: Any = None
        self.lost = False
        """Whether the host or its task died, so that on other hosts, or in another attempt, all may be well."""

    @staticmethod
    def prefix(host: Host) -> str:
        """What stands before each line of a host."""
        return f"[host {host.node_rank}] "

    @property
    def failed(self) -> bool:
        """Whether it has ended otherwise than well."""
        return self._end is not None and self._end.status != 0

    @property
    def is_echo(self) -> bool:
        """Whether its error only says that another host's connections are gone."""
        return self.failed and is_echo(self.explain())

    @property
    def status(self) -> int:
        """Exit status of an ended task; negative: killed by that signal."""
        assert self._end is not None
        return self._end.status

    def explain(self) -> str:
        """The task's own error, or what is known of it where it could not tell."""
        assert self._end is not None
        if self._end.error:
            return self._end.error
        lines = "\n".join(self._tail)
        return f"ended with exit status {self.status} (negative: killed by that signal); its last lines:\n{lines}"

    def start(self) -> Any:
        """Start it; returns the stream of what it yields, for `ray.wait`."""
        self._stream = self.actor.run.options(num_returns="streaming").remote(self.spec)
        return self._stream

    def receive(self) -> bool:
        """Print its next lines, which are there; returns whether it has ended."""
        import ray

        try:
            item = ray.get(next(self._stream))
        except ray.exceptions.RayError as error:
            item = TaskEnd(status=1, error=_explain(error))
            self.lost = not isinstance(error, ray.exceptions.RayTaskError)
        if isinstance(item, TaskEnd):
            self._end = item
            self.lost = self.lost or (item.status < 0 and item.error is None)
            return True
        self._tail.extend(item)
        for line in item:
            CONSOLE.out(f"{self.prefix(self.host)}{line}", highlight=False)
        return False


def follow_tasks(tasks: Sequence[HostTask]) -> HostTask | None:
    """Run the tasks to their ends and print their lines; returns the one whose error ended the job, if any did.

    Once one has failed, or at an interrupt, the others are stopped. No task outlives this call.
    """
    import ray

    running = {task.start(): task for task in tasks}
    ended: list[HostTask] = []
    try:
        _receive(running, ended, lambda: any(task.failed for task in ended))
        failures = [task for task in ended if task.failed]
        if failures:
            _receive(running, ended, lambda: any(task.failed and not task.is_echo for task in ended), _ECHO_S)
            failures = [task for task in ended if task.failed]
        return min(failures, key=lambda task: (not task.lost, task.is_echo), default=None)
    finally:
        try:
            for task in running.values():
                task.actor.stop.remote()
            _receive(running, ended, lambda: False, _STOP_S)
        finally:
            for task in tasks:
                ray.kill(task.actor)


def get_or_explain(answer: Any, host: Host) -> Any:
    """What a host's actor answers.

    Raises:
        ValueError: it could not.
    """
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayError as error:
        raise ValueError(f"{host}: {_explain(error)}") from error


def _receive(
    running: dict[Any, HostTask], ended: list[HostTask], done: Callable[[], bool], limit_s: float | None = None
) -> None:
    """Print what running tasks say and move those that end, until `done`, none is left or the time is over."""
    import ray

    deadline = None if limit_s is None else time.monotonic() + limit_s
    while running and not done():
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(running), num_returns=1, timeout=remaining)
        if not ready:
            return
        for stream in ready:
            if running[stream].receive():
                ended.append(running.pop(stream))


def _explain(error: Any) -> str:
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return str(error.cause)
    return f"Ray lost the host or could not start its worker; {_INSTALL}. Ray says: {error}"
