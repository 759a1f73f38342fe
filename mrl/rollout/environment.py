"""What answers a model in a conversation: a user's function, in worker processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mrl.rewards.messages import Conversation, Outcome
from mrl.rewards.pool import Limits, WorkerPool
from mrl.rewards.worker import FunctionSpec


class Environment(Protocol):
    """Answers conversations. Knows nothing of ranks."""

    def respond(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """The messages that follow each conversation's last answer; none where it is over or an error."""
        ...

    def close(self) -> None:
        """Stop what it started."""
        ...


class FunctionEnvironment:
    """An Environment that calls a function `name(messages, ground_truth, extra_info, **kwargs)` for each conversation.

    It returns None, which ends the conversation, the text of a user's message, or a list of messages with "role" and
    "content". It may be a coroutine function. It is called anew for every turn, in any of the workers, and so has to
    find what it needs in its arguments.

    Args:
        path: Python file.
        kwargs: of every call.
        num_workers: processes.
        timeout_s: wall-clock limit of one call. Importing the file is not counted.
        stop_at_failure: whether a call that fails spares the others.
        sandbox, pass_environment: as in `Limits`.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str = "respond",
        kwargs: Mapping[str, Any] | None = None,
        num_workers: int = 8,
        timeout_s: float = 60.0,
        stop_at_failure: bool = False,
        sandbox: bool = False,
        pass_environment: Sequence[str] = (),
    ) -> None:
        self._stops = stop_at_failure
        self._pool = WorkerPool(
            FunctionSpec(
                path=str(Path(path).expanduser().resolve()), name=name, kwargs=dict(kwargs or {}), kind="environment"
            ),
            Limits(timeout_s=timeout_s, sandbox=sandbox, pass_environment=tuple(pass_environment)),
            num_workers=num_workers,
        )

    def check_function(self) -> None:
        """Raise ValueError if the file is missing or does not import, or has no such function; starts a worker."""
        self._pool.check_function()

    def respond(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """See `Environment`."""
        return self._pool.score(conversations, stop_at_failure=self._stops)

    def close(self) -> None:
        """End the workers; idempotent."""
        self._pool.close()
