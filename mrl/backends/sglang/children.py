"""Entry points of an engine's child processes: SGLang's own, after detaching from the trainer that started them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from tqdm import tqdm

from mrl.backends.sglang.parts import register_rendezvous

LOG_VARIABLE = "MRL_ENGINE_LOG"
"""Environment variable with the file that takes a child's stdout and stderr."""


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler of one tensor-parallel rank."""
    _detach()
    register_rendezvous()
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(*args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> None:
    """SGLang's detokenizer; without a tokenizer it only relays."""
    _detach()
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    run_detokenizer_process(*args, **kwargs)


def _detach() -> None:
    # With torchrun's agent store, SGLang's own rendezvous would wait for a server nobody starts.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    # Ctrl-C reaches the whole foreground group; the trainer decides when its engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(os.environ[LOG_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # A fork may have inherited replaced streams, for example a test runner's.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # By itself tqdm makes a semaphore of the system; whoever started a child that is killed is warned of a leak.
    tqdm.set_lock(threading.RLock())
