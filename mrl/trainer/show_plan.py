"""`mrl plan`: what a configuration, or a model's shape in given layouts, resolves to, without the GPUs it is for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace

from mrl.config.errors import ConfigError
from mrl.config.load import load_config
from mrl.observability.console import setup_logging, show_table
from mrl.scale.command import add_arguments, check_shape_options, read_request, show_shape
from mrl.trainer.machine import Machine, find_machine, host_memory
from mrl.trainer.plan import plan_run

logger = logging.getLogger(__name__)

_GIB = 2**30


def main(argv: Sequence[str]) -> int:
    """Show layouts, sizes and memory of a run. Exit status: 0 it can run, 1 it cannot, 2 bad configuration."""
    arguments = _parser().parse_intermixed_args(argv)
    setup_logging(rank=0)
    try:
        if arguments.model is not None:
            show_shape(read_request(arguments))
            return 0
        check_shape_options(arguments)
        config = load_config(arguments.overrides, arguments.config_name)
        machine = _machine(arguments.gpu_memory_gib, arguments.host_memory_gib, config.trainer.device)
        plan = plan_run(config, machine)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except ValueError as error:
        logger.error("%s", error)
        return 1
    show_table("PPO", plan.rows())
    show_table(plan.memory_title, plan.memory.rows())
    return 0


def _machine(gpu_gib: float | None, host_gib: float | None, requested: str) -> Machine:
    host_bytes = int(host_gib * _GIB) if host_gib else host_memory()
    if gpu_gib is not None:
        return Machine(device="cuda", host_bytes=host_bytes, gpu_bytes=int(gpu_gib * _GIB))
    return replace(find_machine(requested), host_bytes=host_bytes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mrl plan",
        description=(
            "Show what a configuration resolves to, or, with --model, what a job of that shape needs and moves"
        ),
    )
    parser.add_argument("--config-name", default="ppo_megatron_trainer", help="file of configs/ to start from")
    parser.add_argument("--gpu-memory-gib", type=float, help="plan for GPUs of this size; with --model 80")
    parser.add_argument(
        "--host-memory-gib", type=float, help="main memory of each host; by default this one's, with --model 2048"
    )
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="those of the training command")
    return parser
