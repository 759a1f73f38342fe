"""Weights exchanged between ranks: over a wire that buffers nothing, and by processes over gloo."""

import threading
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from host_cases import host_job, host_jobs
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_cases import bitwise_equal, make_spec, poisoned

from mrl.backends.sglang.engine_group import EngineGroup, MeetingPoint, _ThreadWait
from mrl.launch.fork import run_ranks
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.delivery import Delivery
from mrl.reshard.errors import ReshardError
from mrl.reshard.exchange import SLOTS, Exchange
from mrl.reshard.execute import Puller, open_sources

SPEC = make_spec()
TIMEOUT_S = 60.0


class Unbuffered:
    """Messages among threads; neither end is through before both are there, as with a full network."""

    def __init__(self):
        self.bytes = Counter()
        self.most_under_way = Counter()
        self._lock = threading.Lock()
        self._waiting = defaultdict(lambda: (deque(), deque()))
        self._under_way = Counter()

    def of(self, rank):
        return _Port(self, rank)

    def start(self, tensor, sender, receiver, *, sending):
        rank, arrived = (sender if sending else receiver), threading.Event()
        with self._lock:
            self._under_way[rank, sending] += 1
            self.most_under_way[rank] = max(self.most_under_way[rank], self._under_way[rank, sending])
            mine, theirs = self._waiting[sender, receiver][:: 1 if sending else -1]
            mine.append((tensor, arrived))
            if theirs:
                (sent, one), (taken, other) = (queue.popleft() for queue in self._waiting[sender, receiver])
                assert sent.dtype == taken.dtype
                taken.copy_(sent)
                self.bytes[sender, receiver] += sent.nbytes
                one.set()
                other.set()

        def finish():
            if not arrived.wait(TIMEOUT_S):
                raise ReshardError(f"{sender} to {receiver}: nobody came")
            with self._lock:
                self._under_way[rank, sending] -= 1

        return finish


class _Port:
    def __init__(self, wire, rank):
        self._wire, self._rank = wire, rank

    def send(self, tensor, peer):
        return self._wire.start(tensor, self._rank, peer, sending=True)

    def receive(self, tensor, peer):
        return self._wire.start(tensor, peer, self._rank, sending=False)


def exchange_all(job, *, capacity, wire=None):
    """Plans, parameters and results of all ranks, each in a thread of its own."""
    wire = wire or Unbuffered()
    plans = job.plans()
    params = [poisoned(job.params(rank)) for rank in range(len(plans))]

    def run(rank):
        buffers = open_sources(plans[rank], job.sources)
        Puller(plans[rank], buffers, params[rank]).pull()
        kwargs = {"rank": rank, "num_ranks": len(plans), "capacity": capacity}
        return Exchange(plans[rank], buffers, params[rank], **kwargs).run(wire.of(rank))

    with ThreadPoolExecutor(len(plans)) as threads:
        return plans, params, list(threads.map(run, range(len(plans))))


@settings(max_examples=20, deadline=None)
@given(build_job=host_jobs(), capacity=st.sampled_from([8, 104, 1 << 20]))
def test_any_pattern_of_pairs_arrives_bitwise_and_the_wire_carries_what_the_plan_says(build_job, capacity):
    job, wire = build_job(), Unbuffered()
    plans, params, results = exchange_all(job, capacity=capacity, wire=wire)
    for rank, (plan, result) in enumerate(zip(plans, results, strict=True)):
        assert all(bitwise_equal(params[rank][name], param) for name, param in job.params(rank).items())
        assert (result.sent_bytes, result.received_bytes) == (plan.stats.sent_bytes, plan.stats.remote_bytes)
        assert wire.most_under_way[rank] <= SLOTS
    data = {(rank, each.peer): each.num_bytes for rank, plan in enumerate(plans) for each in plan.sends}
    assert wire.bytes.keys() == data.keys()
    # On top of the weights: a digest of 32 bytes, and the sum of each copy, of which there are as many as pieces cut.
    assert all(wire.bytes[pair] - data[pair] >= 8 + 32 for pair in data)
    if capacity > 1000:
        counts = {(rank, each.peer): len(each.copies) for rank, plan in enumerate(plans) for each in plan.sends}
        assert {pair: wire.bytes[pair] - data[pair] for pair in data} == {n: 32 + 8 * c for n, c in counts.items()}


class Corrupting(Unbuffered):
    """Flips a bit of the third message."""

    count = 0

    def start(self, tensor, sender, receiver, *, sending):
        finish = super().start(tensor, sender, receiver, sending=sending)
        if (sender, sending) == (0, False):
            self.count += 1
        number = self.count

        def corrupt():
            finish()
            if (sender, sending, number) == (0, False, 3):
                tensor.view(torch.uint8)[5] ^= 1

        return corrupt


def two_hosts(**fields):
    return host_job(make_spec(**fields), ParallelLayout(world_size=2, pp=2), ranks_per_host=1, tp_size=1)


def test_a_bit_that_flips_on_the_way_is_found_and_its_parameter_named():
    with pytest.raises(ReshardError, match=r"parameter model\.embed_tokens\.weight: checksum .* trainer rank 0 holds"):
        exchange_all(two_hosts(), capacity=1024, wire=Corrupting())


def test_ends_that_planned_differently_do_not_exchange_weights():
    job, other = two_hosts(), two_hosts(attention_bias=False)
    plans = [job.plan(0), other.plan(1)]
    wire = Unbuffered()

    def run(rank):
        each = (job, other)[rank]
        params, buffers = poisoned(each.params(rank)), open_sources(plans[rank], each.sources)
        Exchange(plans[rank], buffers, params, rank=rank, num_ranks=2).run(wire.of(rank))

    with ThreadPoolExecutor(2) as threads:
        errors = [running.exception() for running in [threads.submit(run, rank) for rank in range(2)]]
    assert [str(error)[:13] for error in errors] == ["engine rank 1", "engine rank 0"]
    assert all("planned to send something else" in str(error) for error in errors)


JOB = {"layout": ParallelLayout(world_size=4, tp=2, pp=2), "ranks_per_host": 2, "tp_size": 2}


def addressed(job):
    """The job on the addresses of this machine's loopback interface, which are different hosts to the planner."""
    address = {name: f"127.0.0.{number + 1}" for number, name in enumerate(sorted(set(job.hosts)))}
    job.hosts = tuple(address[host] for host in job.hosts)
    job.sources = [replace(source, host=address[source.host]) for source in job.sources]
    return job


def run_processes(scenario):
    """What `scenario(rank, delivery, group)` returns in a process for each engine rank, and if its weights are right.

    Errors come as (text, seconds).
    """
    job = addressed(host_job(SPEC, **JOB))

    def main(env):
        torch.set_num_threads(1)
        expected = job.params(env.rank)
        params, places = poisoned(expected), job.places(env.rank)
        delivery = Delivery(job.plan(env.rank), job.sources, params, places, capacity=1600)
        point = MeetingPoint(host=env.master_addr, port=env.master_port, name="test", timeout_s=TIMEOUT_S)
        group, begin = EngineGroup(point, places, torch.device("cpu")), time.monotonic()
        try:
            result = scenario(env.rank, delivery, group)
        except ReshardError as error:
            result = str(error), time.monotonic() - begin
            group.give_up("1", str(error))
        group.store.append("through", f"{env.rank},")
        return result, all(bitwise_equal(params[name], expected[name]) for name in expected)

    return run_ranks(main, 4, timeout_s=4 * TIMEOUT_S)


def wait_until_present(group, key, ranks):
    """Until the other ranks have written their numbers under a key of the store."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (group.store.check([key]) and ranks <= set(group.store.get(key).decode().split(","))):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_exchange_over_gloo_round_after_round():
    def scenario(rank, delivery, group):
        results = []
        for number in range(3):
            group.begin(str(number))
            results.append(delivery.run(group))
        stats = delivery.plan.stats
        return [
            (each.exchange.sent_bytes == stats.sent_bytes, each.exchange.received_bytes == stats.remote_bytes > 0)
            for each in results
        ]

    assert run_processes(scenario) == [([(True, True)] * 3, True)] * 4


def test_a_rank_that_cannot_take_part_tells_the_others_why():
    def scenario(rank, delivery, group):
        if rank == 2:
            raise ReshardError("no memory left")
        group.begin("1")
        return "went on"

    outcomes = run_processes(scenario)
    for rank in (0, 1, 3):
        (text, seconds), whole = outcomes[rank]
        assert "engine rank 2 on 127.0.0.2: no memory left" in text
        assert seconds < TIMEOUT_S / 2
        assert not whole


def test_a_sender_that_raises_half_way_ends_the_exchange_on_every_rank(monkeypatch):
    pack = Exchange._pack

    def pack_embedding_only(exchange, message, packed):
        if message.order[2] == 0 and message.parts[0].dst_param != "model.embed_tokens.weight":
            raise ReshardError("lost my memory")
        pack(exchange, message, packed)

    def scenario(rank, delivery, group):
        group.begin("1")
        delivery.run(group)
        return "went on"

    monkeypatch.setattr(Exchange, "_pack", pack_embedding_only)
    outcomes = run_processes(scenario)
    assert outcomes[0][0][0] == "lost my memory"
    # Rank 2 takes from rank 0; the others may have been through with theirs.
    (text, seconds), whole = outcomes[2]
    assert "engine rank 0 on 127.0.0.1: lost my memory" in text
    assert seconds < TIMEOUT_S / 2
    assert not whole


def test_silence_is_an_error_after_the_deadline():
    def scenario(rank, delivery, group):
        group.begin("1")
        if rank == 1:
            wait_until_present(group, "through", {"2", "3"})
            return "silent"
        group._deadline = time.monotonic() + 1.0
        delivery.run(group)
        return "went on"

    outcomes = run_processes(scenario)
    # Rank 3 takes from rank 1 alone, rank 2 from it and from rank 0.
    for rank in (2, 3):
        (text, seconds), whole = outcomes[rank]
        assert "the exchange of weights was given up: engine rank" in text
        assert seconds < TIMEOUT_S / 2
        assert not whole


@pytest.mark.parametrize("arrived", [True, False])
def test_a_transfer_that_gloo_broke_off_is_an_error(arrived):
    class Work:
        def wait(self, timeout):
            return arrived

    waiting = _ThreadWait(Work(), timedelta(seconds=TIMEOUT_S))
    if arrived:
        assert waiting.ended(within_s=TIMEOUT_S)
    else:
        with pytest.raises(RuntimeError, match="broken off"):
            waiting.ended(within_s=TIMEOUT_S)


def test_a_transfer_that_fails_between_two_looks_does_not_pass_as_arrived(monkeypatch):
    fail = threading.Event()

    class Work:
        def wait(self, timeout):
            assert fail.wait(TIMEOUT_S)
            raise RuntimeError("timed out")

    waiting = _ThreadWait(Work(), timedelta(seconds=TIMEOUT_S))
    look = waiting._through.wait

    def look_too_early(within_s):
        fail.set()
        assert look(TIMEOUT_S)
        return False

    monkeypatch.setattr(waiting._through, "wait", look_too_early)
    assert not waiting.ended(within_s=0.0)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="timed out"):
        waiting.ended(within_s=0.0)


def test_a_rank_that_never_comes_is_named():
    def scenario(rank, delivery, group):
        if rank == 3:
            return "stayed away"
        if rank == 0:
            wait_until_present(group, "test/1/present", {"1", "2"})
            group._point = replace(group._point, timeout_s=0.5)
        group.begin("1")
        return "went on"

    outcomes = run_processes(scenario)
    assert "engine ranks 3 on 127.0.0.2 did not come" in outcomes[0][0][0]
    for rank in (1, 2):
        assert "given up: engine rank 0 on 127.0.0.1: engine ranks 3 on 127.0.0.2 did not" in outcomes[rank][0][0]
