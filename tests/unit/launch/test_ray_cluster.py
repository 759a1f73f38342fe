"""Hosts of a Ray cluster: which ones a job gets, in which order, and what is said where they are missing."""

import pytest

from mrl.launch import ray_cluster
from mrl.launch.ray_cluster import Host, HostRequest, count_fitting, describe_nodes, order_hosts, require_ray


def node(name, address, **resources):
    return {"NodeID": name, "NodeManagerAddress": address, "Resources": resources, "Alive": True}


NODES = [
    node("c", "10.0.0.10", CPU=64.0, GPU=8.0),
    node("a", "10.0.0.9", CPU=64.0, GPU=8.0, memory=1e9),
    node("b", "10.0.0.9", CPU=64.0, GPU=4.0),
    node("d", "fd00::2", CPU=4.0),
]


def test_hosts_are_numbered_by_address_and_then_by_node():
    hosts = order_hosts({0: "d", 1: "c", 2: "b", 3: "a"}, NODES)
    assert hosts == (
        Host(node_rank=0, address="10.0.0.9", node_id="a", bundle=3),
        Host(node_rank=1, address="10.0.0.9", node_id="b", bundle=2),
        Host(node_rank=2, address="10.0.0.10", node_id="c", bundle=1),
        Host(node_rank=3, address="fd00::2", node_id="d", bundle=0),
    )
    assert [str(host) for host in hosts[:2]] == ["host 0 (10.0.0.9)", "host 1 (10.0.0.9)"]


def test_a_host_is_one_bundle_of_all_that_its_ranks_need():
    request = HostRequest(nnodes=2, gpus=8, cpus=8)
    assert request.bundle == {"GPU": 8.0, "CPU": 8.0}
    assert str(request) == "2 hosts with 8 GPUs and 8 CPUs each"
    assert count_fitting(request, NODES) == 2
    on_cpu = HostRequest(nnodes=1, gpus=0, cpus=1)
    assert on_cpu.bundle == {"CPU": 1.0}
    assert str(on_cpu) == "1 host with 0 GPUs and 1 CPU"
    assert count_fitting(on_cpu, NODES) == 4


def test_what_the_cluster_has_is_listed_in_the_order_of_hosts():
    assert describe_nodes(NODES[:2], {"CPU": 100.0}) == (
        "it has 2 nodes (10.0.0.9 with 8 GPUs and 64 CPUs, 10.0.0.10 with 8 GPUs and 64 CPUs), of which 0 GPUs and "
        "100 CPUs are free"
    )


def test_a_missing_ray_is_reported_with_its_remedy(monkeypatch):
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is not installed; install mrl\[ray\]"):
        require_ray()
