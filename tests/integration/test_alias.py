"""Engine parameters that are the trainer's memory, in the real SGLang engine on CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import psutil
import pytest
import sglang_jobs as jobs
import torch
from hugging_face import checkpoint_state
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.utils import MultiprocessingSerializer

from mrl.backends.sglang.preload import preload_sglang
from mrl.reshard.reference import sglang_shard

pytestmark = pytest.mark.engine

TP = 2
GREEDY = 8


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    preload_sglang()
    folder = tmp_path_factory.mktemp("model")
    # Large enough for its memory to show in that of the processes; two query groups per rank, so qkv is copied.
    jobs.make_model(folder, hidden_size=256, intermediate_size=4096, num_hidden_layers=4)
    return jobs.in_own_process(observe_aliases, folder)


class Aliased(jobs.TrainedEngine):
    """An engine beside what it shares memory with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, tp_size=TP, updated=False, alias_weights=True)

    def answers(self) -> tuple[list[list[int]], list[list[int]]]:
        """Greedy tokens of the engine and of transformers."""
        generations = self.engine.generate(jobs.PROMPTS, jobs.sampling(GREEDY, temperature=0.0))
        return [list(each.response_ids) for each in generations], jobs.greedy(self.model, GREEDY)

    def trainers_bytes(self) -> str:
        """A digest of all that the trainer exports."""
        digest = hashlib.sha256()
        for rank in self.trainer.memory:
            for name in sorted(rank):
                digest.update(rank[name].numpy().tobytes())
        return digest.hexdigest()

    def expected_fingerprints(self) -> list[dict[str, str]]:
        """Of every engine parameter, from the model's checkpoint."""
        state = checkpoint_state(self.model)
        shards = [sglang_shard(state, self.spec, tp_rank=rank, tp_size=TP, padded_vocab_size=256) for rank in range(TP)]
        return [
            {name: hashlib.sha256(param.contiguous().numpy().tobytes()).hexdigest() for name, param in shard.items()}
            for shard in shards
        ]

    def private_bytes(self) -> int:
        """Memory that the schedulers share with nobody."""
        pids = [process.pid for process in self.engine._supervisor.children.processes[:TP]]
        return sum(psutil.Process(pid).memory_full_info().uss for pid in pids)

    def send_tensor(self) -> tuple[bool, str]:
        """SGLang's own way to write a weight; this one is too short, but that is not looked at."""
        payload = MultiprocessingSerializer.serialize([("model.norm.weight", torch.empty(0))])
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[payload] * TP, load_format=None, flush_cache=False
        )
        manager = self.engine._supervisor.manager
        return self.engine._call(manager.update_weights_from_tensor(request, None), "update_weights")


def observe_aliases(folder: Path) -> dict[str, Any]:
    before = jobs.surroundings()
    aliased, seen = Aliased(folder), {}
    try:
        aliased.engine.poison_weights()
        private = aliased.private_bytes()
        seen["report"] = aliased.update()
        seen["private bytes saved"] = private - aliased.private_bytes()
        seen["graphs wait"] = aliased.engine._weights.graphs_wait
        seen["first answers"] = aliased.answers()
        seen["first fingerprints"] = aliased.engine.fingerprint_weights() == aliased.expected_fingerprints()
        aliased.perturb()
        seen["second report"] = aliased.update()
        seen["second answers"] = aliased.answers()
        seen["second fingerprints"] = aliased.engine.fingerprint_weights() == aliased.expected_fingerprints()
        observe_faults(aliased, seen)
        aliased.engine.restart()
        aliased.update()
        seen["after a restart"] = aliased.answers()
    finally:
        aliased.engine.shutdown()
    seen["left behind"] = jobs.differences(before, jobs.surroundings())
    return seen


def observe_faults(aliased: Aliased, seen: dict[str, Any]) -> None:
    trainers_bytes, whole = aliased.trainers_bytes(), aliased.control
    aliased.engine.poison_weights()
    seen["poisoned"] = aliased.engine.fingerprint_weights() != aliased.expected_fingerprints()
    for name, change in (
        ("failed rank", {"fail_on_rank": 1}),
        ("missing stage", {"sources": whole["sources"][:2]}),
        ("owner gone", {"sources": [without_owner(source) for source in whole["sources"]]}),
    ):
        aliased.control = whole | change
        seen[name] = jobs.error_of(aliased.update)
    seen["another loader"] = aliased.send_tensor()
    aliased.control = whole
    aliased.update()
    seen["after faults"] = aliased.answers()
    seen["trainer unharmed"] = aliased.trainers_bytes() == trainers_bytes


def without_owner(source: dict[str, Any]) -> dict[str, Any]:
    """The same export of a process that has closed its memory."""
    buffers = []
    for buffer in source["buffers"]:
        scheme, pid, descriptor, inode = buffer["handle"].split(":")
        buffers.append(buffer | {"handle": f"{scheme}:{pid}:{descriptor}:{int(inode) + 1}"})
    return source | {"buffers": buffers}


def test_answers_and_parameters_are_those_of_the_trainers_weights(observed):
    for step in ("first", "second"):
        engine, transformers = observed[f"{step} answers"]
        assert engine == transformers
        assert observed[f"{step} fingerprints"]
    assert observed["first answers"] != observed["second answers"]


def test_only_what_the_layouts_do_not_share_is_pulled(observed):
    report = observed["report"]
    qkv = 4 * (256 + 2 * 128) * 256 * 4
    # Rank 1 has 72 rows of the vocabulary and 56 of padding, which are filled.
    assert report.bytes == qkv + 2 * 72 * 256 * 4
    assert report.aliased_bytes > 20 * report.bytes
    assert (observed["second report"].bytes, observed["second report"].aliased_bytes) == (
        report.bytes,
        report.aliased_bytes,
    )
    assert not observed["graphs wait"]


def test_the_engine_gives_its_own_copy_back(observed):
    # 3.4 MB per process is what the first update allocates for its plan, with and without aliases.
    assert observed["private bytes saved"] > observed["report"].aliased_bytes - TP * 6e6 > 30e6


def test_faults_leave_the_trainers_memory_as_it_is(observed):
    assert observed["poisoned"]
    assert "asked to fail" in observed["failed rank"][1]
    assert "model.layers.2" in observed["missing stage"][1]
    assert "its owner" in observed["owner gone"][1]
    ok, message = observed["another loader"]
    assert not ok
    assert "are the trainer's memory" in message
    assert observed["trainer unharmed"]
    engine, transformers = observed["after faults"]
    assert engine == transformers


def test_a_restarted_engine_shares_again_and_nothing_is_left(observed):
    engine, transformers = observed["after a restart"]
    assert engine == transformers
    assert observed["left behind"] == {}
