"""On which addresses processes listen: nothing of a job may be open to other hosts unless it was asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import psutil


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """The addresses on which any of the processes listens."""
    found = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        found |= {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    """Whether only this host reaches the address."""
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
