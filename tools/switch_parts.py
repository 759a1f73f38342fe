"""What the benchmark of the switch runs: the job, its stages with their times, and the checks."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_model import QWEN2_1_5B, TINY, write_model
from torch import Tensor

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.offload import OffloadSettings
from mrl.backends.megatron.optimizer import DataParallelSettings, OptimizerSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.engine import SGLangEngine
from mrl.interfaces import ModelOutput
from mrl.observability.memory import CudaMemory
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.reference import hugging_face_state, sglang_shard
from mrl.reshard.spec import ModelSpec
from mrl.rollout.colocated import ColocatedRollout
from mrl.trainer.phases import ENGINE_TAGS, PhaseSwitch
from mrl.types import Metric, MicroBatchLimit, TrainBatch

_SGLANG_VOCAB_MULTIPLE = 64
_GPU_ENGINE = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "cuda_graph_max_bs_decode": 4,
    "disable_prefill_cuda_graph": True,
}
"""Graphs, which have to survive the switches, but few, so that the engine starts soon."""
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""transformer-engine's names of what the reference calls by the local layers' names."""
_LIMIT = MicroBatchLimit(samples=4)
_REPEATS = 5


class Stages:
    """Seconds of each stage of each switch; a stage that comes several times in one counts once, with the sum."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._current: dict[str, float] | None = None
        self.number = 0
        """How often memory has been reclaimed in this switch."""

    def begin(self, *, keep: bool) -> None:
        """A new switch begins; its times count if they are to be kept."""
        self.end()
        self._current, self.number = ({} if keep else None), 0

    def end(self) -> None:
        """The switch has ended."""
        for name, seconds in (self._current or {}).items():
            self.seconds.setdefault(name, []).append(seconds)
        self._current = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the `with` block towards a stage."""
        begin = time.perf_counter()
        yield
        if self._current is not None:
            self._current[name] = self._current.get(name, 0.0) + time.perf_counter() - begin


@dataclass
class _TimedRole:
    """A role as `PhaseSwitch` sees it."""

    role: MegatronEngine
    stages: Stages

    def release(self) -> None:
        with self.stages("release roles"):
            self.role.release()

    def offload(self) -> None:
        with self.stages("begin offload"):
            self.role.offload()

    def onload(self) -> None:
        with self.stages("begin onload"):
            self.role.onload()


@dataclass
class _TimedRollout:
    """The rollout as `PhaseSwitch` sees it."""

    rollout: ColocatedRollout
    stages: Stages

    def update_weights(self) -> dict[str, float]:
        with self.stages("pull"):
            return self.rollout.update_weights()

    def release_memory(self, tags: Sequence[str]) -> None:
        with self.stages("release engine"):
            self.rollout.release_memory(tags)

    def resume_memory(self, tags: Sequence[str]) -> None:
        with self.stages(f"resume {tags[0]}"):
            self.rollout.resume_memory(tags)


class _TimedMemory(CudaMemory):
    """The device's memory; the waiting and the returning are told apart, and the first time from the others."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self._stages = stages

    def reclaim(self) -> None:
        first, self._stages.number = self._stages.number == 0, self._stages.number + 1
        with self._stages("wait for the last copies" if first else "wait for copies"):
            torch.cuda.synchronize()
        with self._stages("return memory, gradients" if first else "return memory, optimizer"):
            torch.cuda.empty_cache()


@dataclass(kw_only=True)
class Job:
    """A colocated engine with an actor and a critic that take turns with it."""

    spec: ModelSpec
    engine: SGLangEngine
    rollout: ColocatedRollout
    actor: MegatronEngine
    critic: MegatronEngine
    phases: PhaseSwitch
    on_gpu: bool
    _steps: int = field(default=0, init=False)

    def train(self, *, with_critic: bool) -> None:
        """A small pass and update of each role, as a step makes them."""
        self._steps += 1
        batch = _batch(self.spec, seed=self._steps)
        self.actor.compute_log_probs(batch, limit=_LIMIT)
        if with_critic:
            self.critic.compute_values(batch, limit=_LIMIT)
            self.critic.update(batch, _value_loss, limit=_LIMIT)
            self.critic.offload()
        self.actor.update(batch, _policy_loss, limit=_LIMIT)

    def memory_in_use(self) -> int:
        """Bytes of the device in use by everybody; 0 without one."""
        return self.phases.device.in_use() if self.phases.device else 0


@contextmanager
def start_job(folder: Path, *, on_gpu: bool, stages: Stages) -> Iterator[Job]:
    """Engine and roles of a model that is put into `folder`, on CPU a tiny one; the engine waits without memory."""
    spec = write_model(folder, QWEN2_1_5B if on_gpu else TINY, max_length=1024)
    engine = _start_engine(folder, on_gpu=on_gpu)
    try:
        if on_gpu:
            engine.release_memory(ENGINE_TAGS)
            torch.cuda.set_device(0)
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
        memory = _TimedMemory(stages) if on_gpu else None
        roles = [_build(kind, folder, spec, on_gpu=on_gpu) for kind in ("actor", "critic")]
        actor, critic = roles
        rollout = ColocatedRollout(engine, spec=spec, source=actor.export_weights())
        phases = PhaseSwitch(
            rollout=_TimedRollout(rollout, stages),  # type: ignore[arg-type]
            roles=[_TimedRole(role, stages) for role in roles],  # type: ignore[misc]
            engine_tags=ENGINE_TAGS if on_gpu else (),
            device=memory,
        )
        yield Job(spec=spec, engine=engine, rollout=rollout, actor=actor, critic=critic, phases=phases, on_gpu=on_gpu)
    finally:
        engine.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()


def _start_engine(folder: Path, *, on_gpu: bool) -> SGLangEngine:
    return SGLangEngine.start(
        EngineSettings(
            model_path=folder,
            tp_size=1,
            dtype="bfloat16" if on_gpu else "float32",
            device="cuda" if on_gpu else "cpu",
            context_length=512,
            max_running_requests=16,
            max_total_tokens=None if on_gpu else 2048,
            mem_fraction_static=0.6 if on_gpu else None,
            engine_kwargs=_GPU_ENGINE if on_gpu else {},
        ),
        start_timeout_s=240.0,
        call_timeout_s=60.0,
    )


def _build(kind: Any, folder: Path, spec: ModelSpec, *, on_gpu: bool) -> MegatronEngine:
    engine = build_engine(
        RoleSetup(
            kind=kind,
            model_path=str(folder),
            spec=spec,
            layout=ParallelLayout(world_size=1),
            dtype="bfloat16" if on_gpu else "float32",
            device="cuda" if on_gpu else "cpu",
            optimizer=OptimizerSettings(lr=1e-5),
            data_parallel=DataParallelSettings(use_distributed_optimizer=True),
            offload=OffloadSettings(parameters=kind == "critic", gradients=True, optimizer=True),
        )
    )
    engine.offload()
    return engine


def _batch(spec: ModelSpec, *, seed: int) -> TrainBatch:
    shape = (4, 64)
    generator = torch.Generator().manual_seed(seed)
    inside = torch.ones(shape, dtype=torch.bool)
    inside[:, 0] = False
    return TrainBatch(
        tokens=torch.randint(0, spec.vocab_size, shape, generator=generator),
        lengths=torch.full(shape[:1], shape[1]),
        loss_mask=inside,
    )


def _policy_loss(output: ModelOutput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
    return -(output["log_probs"] * batch.loss_mask).mean(), {}


def _value_loss(output: ModelOutput, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
    return ((output["values"] - 1.0).square() * batch.loss_mask).mean(), {}


def check_weights(job: Job) -> None:
    """Raise unless the engine has, byte by byte, what SGLang would have loaded from the actor's checkpoint."""
    with ThreadPoolExecutor(1) as pool:
        # Hashing leaves Python's lock alone.
        expected = pool.submit(_expected_fingerprint, job)
        [found] = job.engine.fingerprint_weights()
    wrong = [name for name, digest in expected.result().items() if found.get(name) != digest]
    if wrong or found.keys() != expected.result().keys():
        others = sorted(found.keys() ^ expected.result().keys())
        raise RuntimeError(f"the engine's {wrong} differ from the trainer's, and only one side has {others}")


def _expected_fingerprint(job: Job) -> dict[str, str]:
    shard = {_local_name(name): parameter.detach().cpu() for name, parameter in job.actor.named_parameters()}
    rows = -(-job.spec.vocab_size // _SGLANG_VOCAB_MULTIPLE) * _SGLANG_VOCAB_MULTIPLE
    state = hugging_face_state([[shard]], job.spec)
    tensors = sglang_shard(state, job.spec, tp_rank=0, tp_size=1, padded_vocab_size=rows)
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def _local_name(name: str) -> str:
    for fused, local in _FUSED_NORMS.items():
        name = name.replace(fused, local)
    return name


def measure_copies() -> tuple[float, float]:
    """GB/s from the device to pinned memory and back, of one block."""
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    rates = []
    for target, source in ((host, device), (device, host)):
        seconds = [_seconds(lambda t=target, s=source: t.copy_(s, non_blocking=True)) for _ in range(_REPEATS + 2)]
        rates.append(host.numel() / statistics.median(seconds[2:]) / 1e9)
    return rates[0], rates[1]


@dataclass(kw_only=True, frozen=True)
class OptimizerTimes:
    """Of one role's optimizer state; seconds until the last byte is there, and until the call returns."""

    num_bytes: int
    out_s: float
    begin_out_s: float
    back_s: float
    """With the allocation of the memory."""
    begin_back_s: float


def measure_optimizer(role: MegatronEngine) -> OptimizerTimes:
    """Medians over trips of the role's optimizer state to the host and back. Nothing else is moved."""
    # The role offers no way to move one part, on purpose.
    offload = role._offload
    copies = offload._state_copies
    assert copies is not None
    offload.need_optimizer()
    num_bytes = sum(tensor.nbytes for tensor in offload._optimizer_tensors())
    times: list[tuple[float, float, float, float]] = []
    for _ in range(_REPEATS + 2):
        copies.mark_changed()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        copies.leave(offload._optimizer_tensors())
        begun = time.perf_counter()
        torch.cuda.synchronize()
        out = time.perf_counter()
        torch.cuda.empty_cache()
        again = time.perf_counter()
        copies.arrive()
        begun_back = time.perf_counter()
        torch.cuda.synchronize()
        times.append((out - begin, begun - begin, time.perf_counter() - again, begun_back - again))
        copies.wait()
    out_s, begin_out_s, back_s, begin_back_s = (statistics.median(each) for each in zip(*times[2:], strict=True))
    return OptimizerTimes(
        num_bytes=num_bytes, out_s=out_s, begin_out_s=begin_out_s, back_s=back_s, begin_back_s=begin_back_s
    )


def median_ms(seconds: Sequence[float]) -> float:
    """The median in ms."""
    return statistics.median(seconds) * 1e3


def _seconds(work: Any) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
