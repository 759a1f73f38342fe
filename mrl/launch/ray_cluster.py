"""Joining a Ray cluster, and getting the job's hosts from it in a fixed order."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mrl.config.frozen import thaw

logger = logging.getLogger(__name__)

_PATIENCE_S = 2.0
"""A cluster that has what is asked gives it at once; after this long a person should know what is missing."""
_FOR_A_START = {"include_dashboard": False}
_ALWAYS = {"log_to_driver": False, "logging_level": "warning"}
"""The job's own lines come through the driver, in order and complete."""


@dataclass(kw_only=True, frozen=True)
class HostRequest:
    """What the job asks of the cluster: so many hosts, each with all of this."""

    nnodes: int
    gpus: int
    cpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one host, as Ray names them."""
        return {name: float(amount) for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    def __str__(self) -> str:
        each = _spell(self.bundle)
        return f"1 host with {each}" if self.nnodes == 1 else f"{self.nnodes} hosts with {each} each"


@dataclass(kw_only=True, frozen=True)
class Host:
    """One host of the job."""

    node_rank: int
    address: str
    """Under which other hosts reach it."""
    node_id: str
    bundle: int
    """Index of its bundle in the placement group."""

    def __str__(self) -> str:
        return f"host {self.node_rank} ({self.address})"


@dataclass(kw_only=True, frozen=True)
class Reservation:
    """Hosts that are the job's alone, as far as the resources that it asked for go."""

    request: HostRequest
    group: Any
    """Ray's placement group."""
    hosts: tuple[Host, ...]


def require_ray() -> None:
    """Raise ValueError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "the job is to run on Ray (trainer.launcher, RAY_ADDRESS), which is not installed; install mrl[ray], here "
            "and on every node"
        )


@contextmanager
def joined_cluster(ray_init: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[bool]:
    """Be part of a Ray cluster; yields whether it may still get nodes, which one that is started here may not.

    The cluster is the one that this process has already joined, else that of `ray_init.address` or RAY_ADDRESS, else
    the one that runs on this host, else a new one, which listens on the loopback interface only and is stopped at the
    end.

    Raises:
        ValueError: no cluster answers at a given address, or Ray refuses an argument.
    """
    import ray  # an optional dependency

    if ray.is_initialized():
        if ray_init:
            logger.warning("ray_kwargs.ray_init does not act: this process has already joined a Ray cluster")
        yield True
        return
    arguments = {**_ALWAYS, **{name: value for name, value in thaw(ray_init).items() if value is not None}}
    address = arguments.pop("address", None) or environ.get("RAY_ADDRESS") or None
    try:
        yield _join(ray, address, arguments)
    finally:
        ray.shutdown()


def _join(ray: Any, address: str | None, arguments: Mapping[str, Any]) -> bool:
    try:
        if address != "local":
            try:
                ray.init(address=address or "auto", **arguments)
                logger.info("joined the Ray cluster at %s", ray.get_runtime_context().gcs_address)
                return True
            except ConnectionError:
                if address:
                    raise
        _start(ray, arguments)
    except (ConnectionError, ValueError, TypeError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"the cluster at {address}" if address else "a cluster"
        raise ValueError(
            f"cannot join {where}: {error}; check ray_kwargs.ray_init and RAY_ADDRESS (the head's GCS address, not its "
            "dashboard's)"
        ) from error
    logger.info("started a Ray cluster on this host")
    return False


def _start(ray: Any, arguments: Mapping[str, Any]) -> None:
    """Start a cluster that only this host reaches: Ray would listen on every interface."""
    from ray._private import ray_constants

    # A word on the token that Ray asks of whoever connects: this one is the job's own, and in no file.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    # Ray has read that variable when it was imported; its processes are yet to.
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(address="local", **{**_FOR_A_START, **arguments})


@contextmanager
def reserved_hosts(request: HostRequest, *, timeout_s: float, may_grow: bool) -> Iterator[Reservation]:
    """Hold the job's hosts, each as one bundle on a node of its own, ordered by address.

    An engine's ranks are neighbours, so with whole hosts in a fixed order they are on one host wherever they fit.

    Raises:
        ValueError: the cluster does not have them within `timeout_s`; the message says what there is.
    """
    from ray.util import placement_group, placement_group_table, remove_placement_group

    strategy = "STRICT_SPREAD" if request.nnodes > 1 else "STRICT_PACK"
    group = placement_group([request.bundle] * request.nnodes, strategy=strategy)
    try:
        _await(group, request, timeout_s, may_grow)
        node_of_bundle = placement_group_table(group)["bundles_to_node_id"]
        yield Reservation(request=request, group=group, hosts=order_hosts(node_of_bundle, _nodes()))
    finally:
        remove_placement_group(group)


def _await(group: Any, request: HostRequest, timeout_s: float, may_grow: bool) -> None:
    if group.wait(min(_PATIENCE_S, timeout_s)):
        return
    nodes = _nodes()
    if may_grow or count_fitting(request, nodes) >= request.nnodes:
        logger.warning("waiting up to %.0f s for %s; %s", timeout_s, request, describe_nodes(nodes, _free()))
        if group.wait(max(0.0, timeout_s - _PATIENCE_S)):
            return
        nodes = _nodes()
    raise ValueError(
        f"the Ray cluster does not have {request} (trainer.nnodes, trainer.n_gpus_per_node): "
        f"{describe_nodes(nodes, _free())}. Start more nodes, end other jobs, lower those keys, or allow more time "
        f"than trainer.ray_wait_register_center_timeout = {timeout_s:.0f} s"
    )


def has_gpus() -> bool:
    """Whether any node of the cluster has a GPU."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def order_hosts(node_of_bundle: Mapping[int, str], nodes: Sequence[Mapping[str, Any]]) -> tuple[Host, ...]:
    """The hosts that hold the bundles, by address and then by node id.

    Args:
        node_of_bundle: node id by index of the bundle.
        nodes: as `ray.nodes()` gives them.
    """
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    places = sorted((_address_key(addresses[node]), node, bundle) for bundle, node in node_of_bundle.items())
    return tuple(
        Host(node_rank=rank, address=addresses[node], node_id=node, bundle=bundle)
        for rank, (_, node, bundle) in enumerate(places)
    )


def count_fitting(request: HostRequest, nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many nodes could hold a bundle if they were free."""
    wanted = request.bundle.items()
    return sum(all(node["Resources"].get(name, 0) >= amount for name, amount in wanted) for node in nodes)


def describe_nodes(nodes: Sequence[Mapping[str, Any]], free: Mapping[str, float]) -> str:
    """What the cluster has, node by node, and what of all that is free."""
    ordered = sorted(nodes, key=lambda node: (_address_key(node["NodeManagerAddress"]), node["NodeID"]))
    each = ", ".join(f"{node['NodeManagerAddress']} with {_spell(node['Resources'])}" for node in ordered)
    number = f"{len(ordered)} node{'' if len(ordered) == 1 else 's'}"
    return f"it has {number} ({each}), of which {_spell(free)} are free"


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _free() -> dict[str, float]:
    import ray

    return ray.available_resources()


def _spell(resources: Mapping[str, float]) -> str:
    amounts = [(f"{resources.get(name, 0):g}", name) for name in ("GPU", "CPU")]
    return " and ".join(f"{amount} {name}{'' if amount == '1' else 's'}" for amount, name in amounts)


def _address_key(address: str) -> tuple[int, int, str]:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return (0, 0, address)
    return (parsed.version, int(parsed), "")
