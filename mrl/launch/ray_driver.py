"""The driver of a job on Ray: one task per host, their lines on this console, one outcome."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrl.config.load import spell_config
from mrl.config.schema import PPOConfig
from mrl.launch.addresses import LOOPBACK
from mrl.launch.fork import interrupt_on_sigterm
from mrl.launch.ray_cluster import Host, HostRequest, Reservation, has_gpus, joined_cluster, require_ray, reserved_hosts
from mrl.launch.ray_host import HostActor, TaskSpec
from mrl.launch.ray_watch import HostTask, follow_tasks, get_or_explain
from mrl.observability.console import CONSOLE, show_table

logger = logging.getLogger(__name__)

_NARROWEST = 60


def launch_on_ray(config: PPOConfig) -> int:
    """Train as configured on hosts of a Ray cluster; returns the exit status.

    No process of the job outlives this call or this process.

    Raises:
        ValueError: Ray is not installed, no cluster answers, it does not have the hosts, or one cannot run mrl.
    """
    require_ray()
    settings = config.ray_kwargs
    try:
        with joined_cluster(settings.ray_init, os.environ) as may_grow, interrupt_on_sigterm():
            status = _run(config, may_grow=may_grow)
            _write_timeline(settings.timeline_json_file)
            return status
    except KeyboardInterrupt:
        logger.error("interrupted; all hosts are stopped")
        return 130


def _run(config: PPOConfig, *, may_grow: bool) -> int:
    """Run on hosts of the cluster; on those that there are then, once more where one was lost.

    Ranks that die are started again by their own host's task, as under every launcher.
    """
    timeout_s, restarts = config.trainer.ray_wait_register_center_timeout, config.trainer.max_restarts
    for attempt in range(restarts + 1):
        with reserved_hosts(_request(config), timeout_s=timeout_s, may_grow=may_grow) as reservation:
            tasks = _prepare(config, reservation)
            show_table("Hosts", [(str(task.host), f"log {task.spec.log}") for task in tasks])
            failed = follow_tasks(tasks)
        if failed is None:
            return 0
        logger.error("%s: %s", failed.host, failed.explain())
        if not failed.lost or attempt == restarts:
            return max(1, failed.status)
        logger.warning("a host was lost: restart %d of %d, from the last checkpoint", attempt + 1, restarts)
    raise AssertionError("unreachable: the last attempt returns")


def _request(config: PPOConfig) -> HostRequest:
    trainer = config.trainer
    on_gpus = trainer.device == "cuda" or (trainer.device == "auto" and has_gpus())
    ranks = trainer.n_gpus_per_node
    # Without GPUs ranks share cores, as they do under every launcher.
    return HostRequest(nnodes=trainer.nnodes, gpus=ranks if on_gpus else 0, cpus=ranks if on_gpus else 1)


def _prepare(config: PPOConfig, reservation: Reservation) -> list[HostTask]:
    """An actor on every host and what its task is to be started with."""
    actors = [_start_actor(reservation, host) for host in reservation.hosts]
    addresses, port = _choose_addresses(config, reservation.hosts, actors)
    # Absolute: hosts need not share a working directory.
    run_dir = Path(config.trainer.default_local_dir).expanduser().absolute()
    text = spell_config(replace(config, trainer=replace(config.trainer, default_local_dir=str(run_dir))))
    common = {
        "MRL_NNODES": str(len(actors)),
        "MASTER_ADDR": addresses[0],
        "MASTER_PORT": str(port),
        "COLUMNS": str(max(_NARROWEST, CONSOLE.width - len(HostTask.prefix(reservation.hosts[-1])))),
    }
    return [
        HostTask(
            host,
            actor,
            TaskSpec(
                config=text,
                environment=common | {"MRL_NODE_RANK": str(host.node_rank), "MRL_HOST_ADDRESS": address},
                folder=os.getcwd(),
                log=str(run_dir / "logs" / f"host-{host.node_rank}.log"),
            ),
        )
        for host, actor, address in zip(reservation.hosts, actors, addresses, strict=True)
    ]


def _start_actor(reservation: Reservation, host: Host) -> Any:
    import ray  # an optional dependency
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = reservation.request.bundle
    options = ray.remote(HostActor).options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        max_concurrency=2,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            reservation.group, placement_group_bundle_index=host.bundle
        ),
    )
    return options.remote()


def _choose_addresses(config: PPOConfig, hosts: tuple[Host, ...], actors: list[Any]) -> tuple[list[str], int]:
    """The address of each host for the others, and the port of host 0 for the job's store.

    A job of one host needs neither: its ranks meet on the loopback interface, at a port of their own choice.
    """
    if len(hosts) == 1:
        return [LOOPBACK], 0
    interface = config.trainer.network_interface
    asked = [actor.address.remote(host.address, interface) for host, actor in zip(hosts, actors, strict=True)]
    addresses = [get_or_explain(answer, host) for host, answer in zip(hosts, asked, strict=True)]
    return addresses, get_or_explain(actors[0].free_port.remote(addresses[0]), hosts[0])


def _write_timeline(path: str | None) -> None:
    if path is not None:
        import ray

        ray.timeline(filename=path)
