"""Addresses of hosts: which one a host has for the others, and what listens on it."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import psutil

LOOPBACK = "127.0.0.1"
JOB_PORTS = range(15000, 25000)
"""For a job's store: below the ports that Linux hands out by itself (net.ipv4.ip_local_port_range, from 32768)."""


def find_host_address(master_addr: str, *, interface: str | None, environ: Mapping[str, str]) -> str:
    """The address of this host that the others of its job reach.

    Args:
        master_addr: name or address of host 0.
        interface: takes precedence, then GLOO_SOCKET_IFNAME, then the interface that routes to `master_addr`.

    Raises:
        ValueError: no such interface, a name that does not resolve, or an address that means another host elsewhere.
    """
    family, destination = resolve(master_addr)
    named = interface or environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    address = _address_on(named, family) if named else _source_address(family, destination)
    if address.startswith("127.") or address == "::1":
        raise ValueError(
            f"host 0 is {master_addr}, which this host reaches from {address}, where no other host does; set "
            "trainer.network_interface, or MRL_HOST_ADDRESS on each host, and give the launcher host 0's address"
        )
    return address


def resolve(name: str) -> tuple[socket.AddressFamily, str]:
    """Family and first address of host 0's name or address.

    Raises:
        ValueError: it has none.
    """
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"host 0's name {name} does not resolve ({error}); give the launcher its address") from error
    return family, str(sockaddr[0])


def interface_of(address: str) -> str:
    """The network interface that has `address`.

    Raises:
        ValueError: none has it.
    """
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return name
    raise ValueError(
        f"no network interface of {socket.gethostname()} has the address {address}; check MRL_HOST_ADDRESS"
    )


def socket_variables(address: str) -> dict[str, str]:
    """Environment variables that keep gloo, NCCL and SGLang on the interface that has `address`."""
    name = interface_of(address)
    # NCCL takes a bare name for the beginning of names.
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}", "SGLANG_HOST_IP": address}


def family_of(address: str) -> socket.AddressFamily:
    """IPv6 for an address with colons."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def join_host_port(host: str, port: int) -> str:
    """`host:port` as in a URL: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address_on(interface: str, family: socket.AddressFamily) -> str:
    entries = psutil.net_if_addrs().get(interface)
    if entries is None:
        raise ValueError(f"this host has no network interface {interface}; it has {', '.join(psutil.net_if_addrs())}")
    addresses = [entry.address for entry in entries if entry.family == family and "%" not in entry.address]
    if not addresses:
        raise ValueError(f"network interface {interface} has no address of host 0's family ({family.name})")
    return addresses[0]


def _source_address(family: socket.AddressFamily, destination: str) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # A datagram socket sends nothing when it connects; the system only chooses the way.
            probe.connect((destination, 9))
        except OSError as error:
            raise ValueError(f"this host has no way to host 0 at {destination} ({error})") from error
        return str(probe.getsockname()[0])
