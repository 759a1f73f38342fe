"""One SGLang engine over several hosts."""

from __future__ import annotations

import os
import signal
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import sglang_jobs as jobs
import torch
import torch.distributed as dist
from host_jobs import run_on_hosts
from hugging_face import checkpoint_state

from mrl.backends.sglang import children
from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.engine import SGLangEngine
from mrl.backends.sglang.follower import EngineFollower
from mrl.backends.sglang.preload import preload_sglang
from mrl.interfaces import EngineError
from mrl.launch.environment import RankEnvironment
from mrl.launch.rendezvous import init_process_group
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.reshard.synthetic import export_layout
from mrl.rollout.colocated import ColocatedRollout
from mrl.trainer.engines import engine_part
from mrl.types import Prompt

pytestmark = pytest.mark.engine

GREEDY = 12
TIMEOUT = timedelta(seconds=240)
PROMPTS = [Prompt(uid=str(i), token_ids=ids, messages=[], data_source="x") for i, ids in enumerate(jobs.PROMPTS)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    preload_sglang()
    folder = tmp_path_factory.mktemp("model")
    jobs.make_model(folder)
    return folder


class Rank:
    """A rank whose host has all weights, with its part of the one engine."""

    def __init__(self, env: RankEnvironment, folder: Path, tp_size: int, max_engine_restarts: int = 0) -> None:
        self.env, self.spec = env, load_spec(folder)
        self.part = self._start(folder, tp_size)
        engine = self.part if isinstance(self.part, SGLangEngine) else None
        self.model = jobs.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.trainer = self._export()
        self.rollout = ColocatedRollout(
            engine,
            follower=self.part if isinstance(self.part, EngineFollower) else None,
            spec=self.spec,
            source=self.trainer.sources[env.rank],
            weight_version=1,
            max_engine_restarts=max_engine_restarts,
        )

    def _start(self, folder: Path, tp_size: int) -> SGLangEngine | EngineFollower | None:
        def join() -> None:
            init_process_group(self.env, backend="gloo", timeout=TIMEOUT)

        part = engine_part(SimpleNamespace(rollout_tp=tp_size, num_engines=1), self.env)
        if part is None:
            join()
            return None
        if part.leads:
            return jobs.start(folder, tp_size=tp_size, part=part, during_start=join)
        limits = {"context_length": 512, "max_total_tokens": 4096}
        settings = EngineSettings(model_path=folder, tp_size=tp_size, dtype="float32", device="cpu", **limits)
        return EngineFollower.start(settings, part=part, start_timeout_s=240.0, during_start=join)

    def _export(self) -> Any:
        rows = -(-self.spec.vocab_size // 256) * 256
        layout = ParallelLayout(world_size=self.env.world_size, tp=1, pp=1)
        state = checkpoint_state(self.model)
        host = socket.gethostname()
        return export_layout(self.spec, state, layout, padded_vocab_size=rows, host=host, first_device=-1)

    def perturb(self) -> None:
        """The same new weights on every rank."""
        torch.manual_seed(7)
        with torch.no_grad():
            for param in self.model.parameters():
                param.add_(torch.randn_like(param) * 0.05)
        for old, new in zip(self.trainer.memory, self._export().memory, strict=True):
            for name, tensor in old.items():
                tensor.copy_(new[name])

    def answers(self, count: int = GREEDY) -> list[list[int]]:
        samples = self.rollout.generate(PROMPTS, jobs.sampling(count, temperature=0.0))
        return [list(sample.generation.response_ids) for sample in samples]

    def close(self) -> None:
        dist.barrier()
        if self.part is not None:
            self.part.shutdown()
        dist.destroy_process_group()


@pytest.mark.parametrize(("ranks_per_host", "ipv6"), [(1, False), (2, True)], ids=["tp2 ipv4", "tp4 ipv6"])
def test_an_engine_over_two_hosts_computes_the_model(make_hosts, model_folder, tmp_path, ranks_per_host, ipv6):
    hosts = make_hosts(2, ipv6=ipv6)

    def main(env: RankEnvironment) -> Any:
        rank = Rank(env, model_folder, tp_size=2 * ranks_per_host)
        schedulers = sum("schedul" in child.name() for child in psutil.Process().children(recursive=True))
        expected, seen = [], []
        for _ in range(2):
            rank.rollout.update_weights()
            seen.append(rank.answers())
            expected.append(jobs.greedy(rank.model, GREEDY))
            rank.rollout.release_memory(["kv_cache"])
            rank.rollout.resume_memory(["kv_cache"])
            rank.perturb()
        rank.close()
        return seen, expected, schedulers, len(psutil.Process().children(recursive=True))

    results = run_on_hosts(hosts, ranks_per_host, main, tmp_path)
    assert len(results) == 2 * ranks_per_host
    for seen, expected, _, left in results:
        assert seen == expected
        assert left == 0
    assert [schedulers for _, _, schedulers, _ in results] == [1, 1] if ranks_per_host == 1 else [2, 0, 2, 0]
    assert [hosts.shared_memory(host) for host in range(2)] == [set(), set()]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_scheduler_that_dies_on_the_second_host(make_hosts, model_folder, tmp_path, restarts):
    hosts = make_hosts(2)

    def main(env: RankEnvironment) -> Any:
        rank = Rank(env, model_folder, tp_size=2, max_engine_restarts=restarts)
        rank.rollout.update_weights()
        if env.rank == 1:
            os.kill(rank.part._supervisor.children.processes[0].pid, signal.SIGKILL)
        try:
            answers, text = rank.answers(), "none"
        except EngineError as error:
            answers, text = [], str(error)
        expected = jobs.greedy(rank.model, GREEDY)
        rank.close()
        return text, answers == expected

    results = run_on_hosts(hosts, 1, main, tmp_path)
    if restarts:
        assert results == [("none", True)] * 2
        return
    (first, _), (second, _) = results
    assert first == second
    assert "rollout engine of rank 0" in first
    assert "on host1: engine died" in first
    assert "exit code -9" in first


def test_a_part_that_cannot_start_ends_the_start_on_every_host(make_hosts, model_folder, tmp_path, monkeypatch):
    hosts = make_hosts(2)

    def main(env: RankEnvironment) -> str:
        if env.node_rank == 1:
            monkeypatch.setattr(children, "register_rendezvous", _fail)
        with pytest.raises(EngineError) as caught:
            Rank(env, model_folder, tp_size=2)
        return str(caught.value)

    first, second = run_on_hosts(hosts, 1, main, tmp_path)
    assert "no scheduler today" in second
    assert "on host1: engine failed to start" in first
    assert "no scheduler today" in first


def _fail() -> None:
    raise OSError("no scheduler today")
