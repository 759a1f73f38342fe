"""What the ranks of a fault job do; imported by its `preload`."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import pull_faults
import torch
import torch.distributed as dist
from fault_jobs import LAST, PADDED_VOCAB, FaultJob, family, running, settled
from safetensors.torch import load_file

from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.backends.sglang import weight_loader
from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.engine import SGLangEngine
from mrl.backends.sglang.parts import EnginePart
from mrl.interfaces import USER_ERRORS
from mrl.launch.environment import RankEnvironment
from mrl.launch.rendezvous import init_process_group
from mrl.launch.watchdog import Deadlines, Patience, Watchdog
from mrl.parallel.agreement import gather_results
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.reference import sglang_shard
from mrl.reshard.spec import load_spec
from mrl.rollout.colocated import ColocatedRollout
from mrl.types import Prompt, SamplingParams

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
LONGEST_S = 240.0
PATIENCE = Patience(echo_s=30.0, peer_s=60.0)
"""On a busy machine a launcher may be late with its word that a rank died."""
GREEDY = SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True)
PROMPTS = [Prompt(uid="0", token_ids=[5, 6, 7, 8], messages=[], data_source="x")]
ON_GPU = {
    "disable_cuda_graph": True,
    "disable_custom_all_reduce": True,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
}
"""Only what weights need: an engine that starts soon."""


class TrainerRank:
    """A rank with its stage of the actor and, on rank 0, the engine of all ranks."""

    def __init__(self, job: FaultJob, env: RankEnvironment, stack: ExitStack, watchdog: Watchdog) -> None:
        self.job, self.rank, self._on_gpu = job, env.rank, job.device == "cuda"
        self.spec = load_spec(job.model)
        self.engine = self._start(env, stack, watchdog)
        stack.callback(dist.destroy_process_group)
        if self._on_gpu and job.world_size > 1:
            # As in training, a communicator of NCCL is there when a rank dies.
            dist.all_reduce(torch.zeros(1, device="cuda"))
        self.actor = build_engine(
            RoleSetup(
                kind="actor",
                model_path=str(job.model),
                spec=self.spec,
                layout=ParallelLayout(world_size=job.world_size, pp=job.world_size),
                device=job.device,
                dtype=DTYPES[job.device],
            )
        )
        self._steps = 0
        self.use(max_engine_restarts=0, weight_version=0)

    def _start(self, env: RankEnvironment, stack: ExitStack, watchdog: Watchdog) -> SGLangEngine | None:
        def join() -> None:
            if self._on_gpu:
                torch.cuda.set_device(env.local_rank)
            backend = "cpu:gloo,cuda:nccl" if self._on_gpu else "gloo"
            init_process_group(env, backend=backend, timeout=timedelta(seconds=LONGEST_S))
            watchdog.start()

        if env.rank:
            join()
            return None
        engine = SGLangEngine.start(
            EngineSettings(
                model_path=self.job.model,
                tp_size=self.job.world_size,
                dtype=DTYPES[self.job.device],
                device=self.job.device,
                context_length=128,
                max_running_requests=4,
                max_total_tokens=2048,
                mem_fraction_static=0.5 if self._on_gpu else None,
                engine_kwargs=ON_GPU if self._on_gpu else {},
            ),
            start_timeout_s=LONGEST_S,
            call_timeout_s=LONGEST_S,
            part=EnginePart(name="engine", store_host=env.master_addr, store_port=env.master_port),
            during_start=join,
        )
        stack.callback(engine.shutdown)
        return engine

    def use(self, *, max_engine_restarts: int, weight_version: int) -> None:
        """Drive the engine anew. Called by all ranks."""
        self.rollout = ColocatedRollout(
            self.engine,
            spec=self.spec,
            source=self.actor.export_weights(),
            max_engine_restarts=max_engine_restarts,
            weight_version=weight_version,
        )

    def train(self) -> None:
        """A step: every weight is twice what it was, which is exact in any type."""
        self._steps += 1
        with torch.no_grad():
            for _, param in self.actor.named_parameters():
                param.mul_(2)
        if self._on_gpu:
            torch.cuda.synchronize()

    def update(self) -> dict[str, Any]:
        """What an update comes to on this rank."""
        seen = {"error": error_of(self.rollout.update_weights), "version": self.rollout.weight_version}
        seen["generation"] = error_of(lambda: self.rollout.generate(PROMPTS, GREEDY))
        if self.engine is not None:
            seen["fault is left"] = self.job.fault.exists()
        return seen

    def parameters(self) -> dict[str, int]:
        """How many of the engine's parameters are of this step, of the one before, and of neither; rank 0 knows."""
        if self.engine is None:
            return {}
        now, before = self._expected(self._steps), self._expected(self._steps - 1)
        found: Counter[str] = Counter(now=0, before=0, torn=0)
        for rank, digests in enumerate(self.engine.fingerprint_weights()):
            assert digests.keys() == now[rank].keys()
            for name, digest in digests.items():
                found["now" if digest == now[rank][name] else "before" if digest == before[rank][name] else "torn"] += 1
        return dict(found)

    def engine_version(self) -> str:
        """The version that SGLang stamps on what it generates."""
        return self.engine._supervisor.manager.server_args.weight_version if self.engine else ""

    def arm(self, *, kills: int | None) -> None:
        """Have the next pull end half way, on the engine's last rank."""
        if self.engine is not None:
            pull_faults.arm(self.job.fault, engine_rank=self.job.world_size - 1, kills=kills)

    def engine_processes(self) -> list[tuple[int, float]]:
        """Those that run now, on rank 0."""
        processes = self.engine._supervisor.children.processes if self.engine else []
        return [mark for process in processes for mark in family(process.pid)]

    def in_use_gib(self) -> float:
        """On this rank's device, by anybody."""
        if not self._on_gpu:
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    def _expected(self, steps: int) -> list[dict[str, str]]:
        dtype = getattr(torch, DTYPES[self.job.device])
        state = {
            name: tensor.to(dtype) * 2**steps
            for name, tensor in load_file(self.job.model / "model.safetensors").items()
        }
        size = self.job.world_size
        shards = [
            sglang_shard(state, self.spec, tp_rank=rank, tp_size=size, padded_vocab_size=PADDED_VOCAB)
            for rank in range(size)
        ]
        return [{name: weight_loader._digest(param) for name, param in shard.items()} for shard in shards]


def error_of(work: Callable[[], Any]) -> str:
    """Type and text of what `work` raises; empty if nothing."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(job: FaultJob, env: RankEnvironment) -> None:
    """All faults, one after the other; the last ends the job."""
    seen: dict[str, Any] = {}
    deadlines = Deadlines(default_s=LONGEST_S)
    watchdog = Watchdog(env, deadlines, run_dir=job.folder, user_errors=USER_ERRORS, patience=PATIENCE)
    with ExitStack() as stack, _recorded(job, env.rank, seen), watchdog:
        pull_faults.require_plugins()
        rank = TrainerRank(job, env, stack, watchdog)
        for observe in (observe_refusal, observe_engine_death, observe_trainer_death):
            watchdog.enter(observe.__name__)
            observe(rank, seen)


@contextmanager
def _recorded(job: FaultJob, rank: int, seen: dict[str, Any]) -> Iterator[None]:
    try:
        yield
        seen["end"] = "no error"
    except BaseException as error:
        seen["end"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        _save(job, rank, seen)


def _save(job: FaultJob, rank: int, seen: dict[str, Any]) -> None:
    job.seen_by(rank).write_text(json.dumps(seen))


def observe_refusal(rank: TrainerRank, seen: dict[str, Any]) -> None:
    """A pull that one engine rank refuses half way, and the update after it."""
    seen["first"] = rank.update() | {"parameters": rank.parameters()}
    rank.train()
    rank.arm(kills=None)
    seen["refused"] = rank.update() | {"parameters": rank.parameters(), "engine version": rank.engine_version()}
    seen["repaired"] = rank.update() | {"parameters": rank.parameters(), "engine version": rank.engine_version()}


def observe_engine_death(rank: TrainerRank, seen: dict[str, Any]) -> None:
    """An engine process that dies half way, first where that is an error, then where the engine is replaced."""
    before, gib = rank.engine_processes(), rank.in_use_gib()
    rank.train()
    rank.arm(kills=0)
    seen["engine killed"] = rank.update()
    rank.use(max_engine_restarts=1, weight_version=rank.rollout.weight_version + 1)
    seen["replaced"] = rank.update() | {"parameters": rank.parameters(), "engine version": rank.engine_version()}
    seen["replaced"] |= {"left running": settled(lambda: running(before)), "device_gib": (gib, rank.in_use_gib())}


def observe_trainer_death(rank: TrainerRank, seen: dict[str, Any]) -> None:
    """The last rank's death while the engine reads its memory."""
    rank.train()
    victim = gather_results(os.getpid)[-1]
    rank.arm(kills=victim)
    seen["processes"] = family()
    seen[LAST] = {"version before": rank.rollout.weight_version}
    _save(rank.job, rank.rank, seen)
    # As a rank of another host, which this one's launcher does not stop: it has to find out by itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        rank.rollout.update_weights()
    finally:
        seen[LAST]["version"] = rank.rollout.weight_version
