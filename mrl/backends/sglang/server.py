"""`mrl serve-judge`: SGLang's HTTP server, also where there is no GPU."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mrl.backends.sglang.arguments import child_environment, server_args
from mrl.backends.sglang.leftovers import Leftovers
from mrl.backends.sglang.preload import preload_sglang
from mrl.launch.addresses import join_host_port
from mrl.observability.console import setup_logging

# Not by __name__, which is "__main__" under python -m: SGLang raises the level of all loggers but the package's.
logger = logging.getLogger("mrl.backends.sglang.server")

_OF_ROLLOUTS = ("skip_tokenizer_init", "load_format", "custom_weight_loader", "weight_version")
"""Arguments of an engine that takes and gives token ids and has its weights from a trainer."""
_ANSWER_S, _PAUSE_S = 300.0, 0.1
_CPU_ONLY = {
    # SGLang would take half of the machine's memory for its cache.
    "max_total_tokens": 16384,
    # Its masks have no CPU kernel: a request with a `response_format` would end the server.
    "grammar_backend": "none",
    # It asks for text in English, of which a small alphabet may leave no token.
    "skip_server_warmup": True,
}


def main(argv: Sequence[str]) -> int:
    """Serve a model until a signal ends it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="mrl serve-judge",
        description="Serve a model by SGLang at http://HOST:PORT/v1, for reward.judge.url. Further options are "
        "SGLang's own (--tp 2, --mem-fraction-static 0.8, ...).",
    )
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="30000")
    parser.add_argument("--api-key-env", help="variable with the token that requests need, as reward.judge.api_key_env")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, more = parser.parse_known_args(argv)
    setup_logging(rank=0)
    if not os.path.isfile(os.path.join(arguments.model, "config.json")):
        logger.error("%s is not a Hugging Face model folder: it has no config.json", arguments.model)
        return 2
    try:
        token = find_token(arguments.host, arguments.api_key_env, more)
    except ValueError as error:
        logger.error("%s", error)
        return 2
    preload_sglang()
    values = {"log_level": "warning", **(_cpu_arguments() if arguments.device == "cpu" else {})}
    values |= {"model_path": arguments.model, "host": arguments.host, "port": arguments.port}
    _serve([*_flags({**values, "device": arguments.device, **token}), *more])
    return 0


def find_token(host: str, variable: str | None, more: Sequence[str]) -> dict[str, str]:
    """SGLang's argument with the token; none is needed where only this host can ask.

    Args:
        variable: environment variable with the token; on the command line everyone on the host could read it.
        more: SGLang's own options, of which one may be its --api-key.

    Raises:
        ValueError: the variable is not set, or others can ask and there is no token.
    """
    if variable is not None:
        if not os.environ.get(variable):
            raise ValueError(f"the environment variable {variable} is not set; it has to hold the token")
        return {"api_key": os.environ[variable]}
    if not _is_loopback(host) and not any(option.split("=")[0] == "--api-key" for option in more):
        raise ValueError(
            f"--host {host} lets other hosts ask, so requests need a token; put one into an environment variable and "
            "name it with --api-key-env here and with reward.judge.api_key_env in the run"
        )
    return {}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _cpu_arguments() -> dict[str, Any]:
    values = server_args("cpu", log_level="warning", **_CPU_ONLY)
    return {name: value for name, value in values.items() if name not in _OF_ROLLOUTS}


def _serve(flags: list[str]) -> None:
    import sglang.srt.entrypoints.engine as sglang_engine
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    parsed = prepare_server_args(flags)
    if parsed.device == "cpu":
        os.environ.update(child_environment("cpu", parsed.tp_size))
        sglang_engine.mp = _Forking()
    leftovers = Leftovers()
    _remove_files_of_ports(sglang_engine.PortArgs, leftovers)
    folder = tempfile.mkdtemp(prefix="mrl_judge_")
    leftovers.add(Path(folder))
    if parsed.nnodes == 1 and (parsed.dp_size == 1 or parsed.enable_dp_attention):
        # Its processes would meet at a port that listens on every interface. Replicas and hosts need one for each.
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{folder}/store"

    def announce() -> None:
        place = join_host_port(parsed.host, parsed.port)
        _wait_for_answer(f"http://{place}/health_generate")
        logger.info("judge %s answers at http://%s/v1", parsed.model_path, place)

    try:
        launch_server(parsed, launch_callback=announce)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _wait_for_answer(url: str) -> None:
    """Return when a token has been through all of the server's processes, or none was in a long time."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _ANSWER_S
    # The interpreter waits for this thread when the server was stopped.
    while time.monotonic() < deadline and threading.main_thread().is_alive():
        try:
            with opener.open(url, timeout=_ANSWER_S):
                return
        except OSError:
            # Also an answer of 503: not yet.
            time.sleep(_PAUSE_S)
    logger.warning("the judge has not answered so far")


def _remove_files_of_ports(port_args: Any, leftovers: Leftovers) -> None:
    """Have the files removed that SGLang makes for its ports and leaves."""
    from mrl.backends.sglang.launch import files_of

    choose = port_args.init_new

    def init_new(*args: Any, **kwargs: Any) -> Any:
        ports = choose(*args, **kwargs)
        for path in files_of(ports):
            leftovers.add(path)
        return ports

    port_args.init_new = staticmethod(init_new)


class _Forking:
    """Stands in for `multiprocessing` while SGLang starts its processes: they inherit what is imported here."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.Process = context.Process
        self.Pipe = context.Pipe

    def set_start_method(self, method: str, force: bool = False) -> None:
        """Keep forking."""


def _flags(values: dict[str, Any]) -> list[str]:
    """SGLang's command-line options of its arguments' names."""
    flags: list[str] = []
    for name, value in values.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
