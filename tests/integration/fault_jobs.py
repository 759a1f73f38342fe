"""A job whose pulls fail half way: its model, its launch, and what is left when it has ended. Starts no CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pull_faults
import torch
from safetensors.torch import save_file

from mrl.interfaces import USER_ERRORS
from mrl.launch.addresses import LOOPBACK
from mrl.launch.environment import RankEnvironment, host_environments
from mrl.launch.restart import RunFailed, run_with_restarts
from mrl.launch.store import serve_store
from mrl.reshard.families import spec_from_config, tensor_shapes

VOCAB, PADDED_VOCAB = 200, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": VOCAB,
    # Heads of 64, which attention kernels of GPUs have.
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAST = "trainer killed"
"""The last thing that happens in a job."""

_MEMORY_SCRIPT = """
import json
import torch
print(json.dumps([torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]))
"""
_SETTLE_S = 30.0
_GIB = 2**30


@dataclass(kw_only=True, frozen=True)
class FaultJob:
    """Trainer ranks, one pipeline stage each, and one engine over all of their devices."""

    folder: Path
    world_size: int
    device: str

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def fault(self) -> Path:
        """Where the next fault is described."""
        return self.folder / "fault.json"

    def seen_by(self, rank: int) -> Path:
        """Where a rank says what it observed."""
        return self.folder / f"seen-{rank}.json"


@dataclass(kw_only=True, frozen=True)
class Outcome:
    """What a job came to."""

    job: FaultJob
    failure: str
    """The launcher's error."""
    seen: list[dict[str, Any]]
    """By every rank."""
    left_running: list[str]
    left_in_shm: list[str]
    device_gib: list[tuple[float, float]]
    """In use on each device before and after, by anybody."""


def preload() -> None:
    """Import what ranks and engines need: on CPU before they are forked; with GPUs in each rank, for it starts CUDA."""
    # Megatron first: SGLang's imports pull it in unprepared for a CPU.
    import_module("mrl.backends.megatron.preload").preload_megatron()
    import_module("mrl.backends.sglang.preload").preload_sglang()
    import_module("fault_ranks")


def run_job(job: FaultJob) -> Outcome:
    """Run the job to its end, which is a rank's death.

    Raises:
        RuntimeError: it ended before.
    """
    make_model(job.model)
    shm, memory = _shared_memory(), _device_gib(job.device)
    failure = _launch(job)
    seen = [json.loads(path.read_text()) if path.exists() else {} for path in map(job.seen_by, range(job.world_size))]
    if any(LAST not in each for each in seen):
        raise RuntimeError(f"the job ended before its last fault: {failure}\n{json.dumps(seen, indent=1)}")
    processes = [mark for each in seen for mark in each["processes"]]
    return Outcome(
        job=job,
        failure=failure,
        seen=seen,
        left_running=settled(lambda: running(processes)),
        left_in_shm=settled(lambda: sorted(_shared_memory() - shm)),
        device_gib=list(zip(memory, _device_gib(job.device), strict=True)),
    )


def make_model(folder: Path) -> None:
    """A small random Llama as a Hugging Face folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * 0.05 + ("norm" in name)
        for name, shape in tensor_shapes(spec_from_config(CONFIG)).items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def settled(left: Callable[[], list[str]]) -> list[str]:
    """What is still left when the system has had time to take back what ended processes had."""
    deadline = time.monotonic() + _SETTLE_S
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def family(pid: int | None = None) -> list[tuple[int, float]]:
    """A process, or this one, and all below it, as `running` takes them."""
    itself = psutil.Process(pid)
    return [(process.pid, process.create_time()) for process in [itself, *itself.children(recursive=True)]]


def running(processes: Sequence[Sequence[float]]) -> list[str]:
    """Those that have not ended."""
    found = []
    for pid, created in processes:
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        except psutil.NoSuchProcess:
            continue
    return found


def _launch(job: FaultJob) -> str:
    with serve_store(LOOPBACK) as port:
        ranks = host_environments(num_nodes=1, ranks_per_node=job.world_size, master_addr=LOOPBACK, master_port=port)
        try:
            run_with_restarts(lambda: partial(_rank_main, job), ranks, max_restarts=0, user_errors=USER_ERRORS)
        except RunFailed as error:
            return str(error)
    return "no error"


def _rank_main(job: FaultJob, env: RankEnvironment) -> None:
    pull_faults.install(job.folder / f"plugins-{env.rank}", job.fault)
    preload()
    import_module("fault_ranks").run(job, env)


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _device_gib(device: str) -> list[float]:
    """In a process of its own, whose context counts each time."""
    if device == "cpu":
        return []
    answer = subprocess.run([sys.executable, "-c", _MEMORY_SCRIPT], check=True, capture_output=True, text=True)
    return [(total - free) / _GIB for free, total in json.loads(answer.stdout)]
