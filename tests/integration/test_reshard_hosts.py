"""Weights that reach real SGLang engines from another host: two addresses of this machine stand for two hosts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sglang_jobs as jobs
import torch
import torch.distributed as dist
from hugging_face import checkpoint_state

from mrl.backends.sglang.engine import SGLangEngine
from mrl.backends.sglang.preload import preload_sglang
from mrl.interfaces import EngineError
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.delivery import Delivery
from mrl.reshard.exchange import Exchange
from mrl.reshard.layout import SourceRank
from mrl.reshard.spec import load_spec
from mrl.reshard.synthetic import SyntheticTrainer, export_layout
from mrl.rollout.colocated import ColocatedRollout
from mrl.types import Prompt

pytestmark = pytest.mark.engine

GREEDY = 8
HOSTS = ("127.0.0.1", "127.0.0.2")
PROMPTS = [Prompt(uid=str(i), token_ids=ids, messages=[], data_source="x") for i, ids in enumerate(jobs.PROMPTS)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    preload_sglang()
    folder = tmp_path_factory.mktemp("model")
    jobs.make_model(folder)
    return folder


def export_two_stages(folder: Path) -> SyntheticTrainer:
    """The model's first and last layers, each on a trainer rank of its own."""
    model = jobs.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = ParallelLayout(world_size=2, pp=2)
    place = {"padded_vocab_size": 256, "host": HOSTS[0], "first_device": -1}
    return export_layout(load_spec(folder), checkpoint_state(model), layout, **place)


class Rank:
    """One of two trainer ranks, with the engine that it owns."""

    def __init__(self, folder: Path, engine: SGLangEngine | None, rank: int) -> None:
        self.engine, self._spec = engine, load_spec(folder)
        self._trainer = export_two_stages(folder)
        self._source: SourceRank = self._trainer.sources[rank]

    def rollout(self, host: str) -> ColocatedRollout:
        """A front whose sources of this rank lie on `host`."""
        source = replace(self._source, host=host)
        return ColocatedRollout(self.engine, spec=self._spec, source=source, reshard_timeout_s=120.0)

    def fingerprints(self) -> list[dict[str, str]]:
        return self.engine.fingerprint_weights() if self.engine else []

    def poison(self) -> None:
        if self.engine:
            self.engine.poison_weights()


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except EngineError as error:
        return str(error)
    return "no error"


def observe(rank: Rank, number: int, fails: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {"local metrics": rank.rollout(HOSTS[0]).update_weights(), "local": rank.fingerprints()}
    rank.poison()
    rollout = rank.rollout(HOSTS[number])
    seen["metrics"] = [rollout.update_weights() for _ in range(2)][1]
    seen["remote"] = rank.fingerprints()
    samples = rollout.generate(PROMPTS, jobs.sampling(GREEDY, temperature=0.0))
    seen["greedy"] = [list(sample.generation.response_ids) for sample in samples]

    dist.barrier()
    fails.value = 1
    seen["error"] = error_of(rollout.update_weights)
    seen["version after it"] = rollout.weight_version
    seen["generation after it"] = error_of(lambda: rollout.generate(PROMPTS, jobs.sampling(1)))
    fails.value = 0
    dist.barrier()
    rank.poison()
    rollout.update_weights()
    seen["version after repair"], seen["repaired"] = rollout.weight_version, rank.fingerprints()
    return seen


@pytest.mark.parametrize("tp_sizes", [{0: 2}, {0: 1, 1: 1}], ids=["one tp2", "two tp1"])
def test_weights_of_another_host_arrive_bitwise_or_are_an_error_everywhere(model_folder, tp_sizes, monkeypatch):
    fails, pack = multiprocessing.get_context("fork").Value("i", 0), Exchange._pack

    def pack_until_told(exchange, message, packed):
        # Half way: of the messages that engine rank 0 sends, the first still goes out.
        if fails.value and message.order[1:] == (1, 0):
            raise RuntimeError("lost my memory")
        pack(exchange, message, packed)

    monkeypatch.setattr(Exchange, "_pack", pack_until_told)
    monkeypatch.setitem(Delivery.__init__.__kwdefaults__, "capacity", 1 << 14)

    def main(env: RankEnvironment) -> dict[str, Any]:
        torch.set_num_threads(1)
        engine = jobs.start(model_folder, tp_size=tp_sizes[env.rank]) if env.rank in tp_sizes else None
        try:
            init_process_group(env, backend="gloo", timeout=timedelta(seconds=240))
            seen = observe(Rank(model_folder, engine, env.rank), env.rank, fails)
            dist.barrier()
        finally:
            if engine is not None:
                engine.shutdown()
        dist.destroy_process_group()
        return seen

    expected = jobs.in_own_process(
        lambda: jobs.greedy(jobs.LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval(), GREEDY)
    )
    for seen in run_ranks(main, 2, timeout_s=280):
        assert seen["remote"] == seen["local"]
        assert seen["repaired"] == seen["local"]
        assert seen["greedy"] == expected
        assert (seen["version after it"], seen["version after repair"]) == (1, 2)
        assert "lost my memory" in seen["error"]
        assert "engine cannot generate: the last weight update failed" in seen["generation after it"]
        local, metrics = seen["local metrics"], seen["metrics"]
        assert (local["reshard/remote_bytes"], metrics["reshard/bytes"]) == (0, local["reshard/bytes"])
        # Half of the layers, and one of the embedding and the head, at least; and the rest is here.
        assert 0.4 < metrics["reshard/remote_bytes"] / metrics["reshard/bytes"] < 0.6
