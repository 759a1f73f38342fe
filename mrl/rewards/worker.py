"""A reward worker: its own process, so that a verifier that hangs or crashes can be ended and replaced.

Started by `mrl.rewards.pool` as a program of its own, not by multiprocessing: that would either fork a process full of
other people's threads or import the trainer's main module again. Imports stay light.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mrl.launch.lifeline import end_with_parent
from mrl.rewards import sandbox
from mrl.rewards.messages import Item, Outcome, Preparing, Ready, check_messages, encode_answer


@dataclass(kw_only=True, frozen=True)
class FunctionSpec:
    """Which function is called, with its fixed keyword arguments; without a file, the built-in verifiers are."""

    path: str | None = None
    name: str = "compute_score"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["reward function", "environment"] = "reward function"
    """What it returns: a score, or messages."""


def load_function(spec: FunctionSpec) -> Callable[..., Any]:
    """The function that `spec` names.

    Raises:
        ValueError: the file is missing or does not import, or has no such function.
    """
    if spec.path is None:
        from mrl.rewards import rules  # only here: a user's function does without the built-in verifiers

        return rules.compute_score
    module = _import_file(Path(spec.path).expanduser(), spec.kind)
    function = getattr(module, spec.name, None)
    if not callable(function):
        present = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{spec.path} has no function {spec.name!r}; its functions are {present}")
    return function


def _import_file(path: Path, kind: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{kind} file {path} does not exist")
    module_spec = importlib.util.spec_from_file_location("mrl_custom_reward", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{kind} file {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{kind} file {path} does not import: {_describe(error)}") from error
    return module


Reader = Callable[[Any], Outcome]
"""Makes an outcome of what a function has returned."""


def score_item(function: Callable[..., Any], item: tuple[Any, ...], kwargs: Mapping[str, Any], read: Reader) -> Outcome:
    """Call a plain function on one item; whatever it raises becomes the outcome's error."""
    try:
        return read(function(*item, **kwargs))
    except Exception as error:
        return Outcome(0.0, {}, _describe(error))


async def score_items(
    function: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    kwargs: Mapping[str, Any],
    timeout_s: float,
    read: Reader,
) -> list[Outcome]:
    """Call a coroutine function on all items at once, each with its own time limit."""

    async def score(item: tuple[Any, ...]) -> Outcome:
        try:
            return read(await asyncio.wait_for(function(*item, **kwargs), timeout_s))
        except TimeoutError:
            return Outcome(0.0, {}, f"took longer than its time limit of {timeout_s:g} s")
        except Exception as error:
            return Outcome(0.0, {}, _describe(error))

    return list(await asyncio.gather(*map(score, items)))


def _read_messages(result: Any) -> Outcome:
    """Nothing, which ends the conversation, a user's text, or a list of messages."""
    if result is None:
        return Outcome(0.0, {})
    messages = [{"role": "user", "content": result}] if isinstance(result, str) else result
    try:
        return Outcome(0.0, {}, messages=check_messages(messages))
    except ValueError as error:
        return Outcome(0.0, {}, f"returned what it must not: {error}")


def _read_score(result: Any) -> Outcome:
    """A number, or a mapping with "score"; other numbers of the mapping are its parts, text and the like is dropped."""
    parts = dict(result) if isinstance(result, Mapping) else {"score": result}
    if "score" not in parts:
        return Outcome(0.0, {}, f"returned {result!r:.200}, a mapping without 'score'")
    try:
        score = _as_float(parts.pop("score"))
    except TypeError:
        return Outcome(0.0, {}, f"returned {result!r:.200}, which is neither a number nor a mapping with 'score'")
    if not math.isfinite(score):
        return Outcome(0.0, {}, f"returned {result!r:.200}, which is not a finite number")
    numbers: dict[str, float] = {}
    for key, value in parts.items():
        try:
            numbers[str(key)] = _as_float(value)
        except TypeError:
            continue
    return Outcome(score, numbers)


def _as_float(value: Any) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{type(value).__name__} is not a number")
    return float(value)


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {error}{place}"


_READERS: Mapping[str, Reader] = {"reward function": _read_score, "environment": _read_messages}


def serve(connection: Connection) -> None:
    """Load the function named in the first message, then answer lists of items until the connection closes."""
    spec, timeout_s = connection.recv()
    try:
        function = load_function(spec)
    except ValueError as error:
        connection.send_bytes(encode_answer(Ready(False, str(error))))
        return
    is_async = inspect.iscoroutinefunction(function)
    read = _READERS[spec.kind]
    connection.send_bytes(encode_answer(Ready(is_async)))
    while True:
        try:
            items = connection.recv()
        except EOFError:
            return
        if spec.path is None:
            _prepare(connection, items[0], spec.kwargs)
        if is_async:
            outcomes = asyncio.run(score_items(function, items, spec.kwargs, timeout_s, read))
        else:
            outcomes = [score_item(function, item, spec.kwargs, read) for item in items]
        connection.send_bytes(encode_answer(outcomes))


def _prepare(connection: Connection, item: Item, kwargs: Mapping[str, Any]) -> None:
    from mrl.rewards import rules  # as in load_function

    library = rules.missing_library(item.data_source, kwargs)
    if library is not None:
        connection.send_bytes(encode_answer(Preparing()))
        with contextlib.suppress(ImportError):  # the verifier meets it again and reports it
            importlib.import_module(library)
        connection.send_bytes(encode_answer(Preparing()))


def main(connection: int, lifeline: int, *, sandboxed: bool) -> None:
    """Entry point; the numbers are inherited file descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(lifeline)
    if sandboxed:
        sandbox.enter(lifeline)
    serve(Connection(connection))
