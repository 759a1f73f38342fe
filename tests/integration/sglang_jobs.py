"""What the engine tests run in a process of their own, forked from the preloaded test process."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch
from hugging_face import checkpoint_state
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.engine import SGLangEngine
from mrl.launch.environment import RankEnvironment
from mrl.launch.fork import run_ranks
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec, load_spec
from mrl.reshard.synthetic import SyntheticTrainer, export_layout
from mrl.types import Generation, SamplingParams

EOS = 2
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 100, 199, 150, 151, 20, 21, 22, 23], [42]]


def make_model(folder: Path, *, kv_heads: int = 4, seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """A small random Llama, saved to `folder`; 200 tokens, so that SGLang pads its vocabulary."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4} | fields
    config = LlamaConfig(
        vocab_size=200,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        **shape,
    )
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def export_trainer(spec: ModelSpec, model: PreTrainedModel, *, pp: int = 2) -> SyntheticTrainer:
    """The model's weights as trainer ranks (TP2 x PP) on this machine would export them."""
    layout = ParallelLayout(world_size=2 * pp, tp=2, pp=pp)
    state = checkpoint_state(model)
    rows = -(-spec.vocab_size // 256) * 256
    return export_layout(spec, state, layout, padded_vocab_size=rows, host=socket.gethostname(), first_device=-1)


def control_of(spec: ModelSpec, trainer: SyntheticTrainer) -> dict[str, Any]:
    """The control message of an update from these sources."""
    return {"spec": spec.to_json(), "sources": [source.to_json() for source in trainer.sources]}


class TrainedEngine:
    """An engine, the model it should compute, and the exported memory it pulls from."""

    def __init__(self, folder: Path, *, tp_size: int, updated: bool = True, **kwargs: Any) -> None:
        self.spec = load_spec(folder)
        # Before the model, whose loading may leave a thread behind.
        self.engine = start(folder, tp_size=tp_size, **kwargs)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.trainer = export_trainer(self.spec, self.model)
        self.control = control_of(self.spec, self.trainer)
        self.version = 0
        if updated:
            self.update()

    def update(self) -> Any:
        """Pull what the exported memory holds now."""
        self.version += 1
        return self.engine.update_weights(self.control, weight_version=self.version)

    def perturb(self) -> None:
        """An optimizer step: new weights in the model and, in place, in the exported memory."""
        with torch.no_grad():
            for param in self.model.parameters():
                param.add_(torch.randn_like(param) * 0.05)
        changed = export_trainer(self.spec, self.model)
        for old, new in zip(self.trainer.memory, changed.memory, strict=True):
            for name, tensor in old.items():
                tensor.copy_(new[name])

    def log_prob_error(self, generations: Sequence[Generation], temperature: float) -> float:
        """Largest difference between the engine's log-probs and transformers' at `temperature`."""
        worst = 0.0
        for prompt, generation in zip(PROMPTS, generations, strict=True):
            tokens = torch.tensor([[*prompt, *generation.response_ids]])
            with torch.no_grad():
                log_probs = (self.model(tokens).logits[0] / temperature).log_softmax(-1)
            response = torch.arange(len(prompt), tokens.shape[1])
            expected = log_probs[response - 1, tokens[0, response]]
            worst = max(worst, (expected - torch.tensor(generation.rollout_log_probs)).abs().max().item())
        return worst


def greedy(model: PreTrainedModel, count: int) -> list[list[int]]:
    """The next `count` tokens of each prompt by transformers."""
    rows = []
    for prompt in PROMPTS:
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        rows.append(tokens[0, len(prompt) :].tolist())
    return rows


def start(folder: Path, *, tp_size: int, **kwargs: Any) -> SGLangEngine:
    """A small fp32 engine on CPU."""
    values = {"context_length": 512, "max_total_tokens": 4096, **kwargs}
    names = {each.name for each in fields(EngineSettings)}
    settings = {name: value for name, value in values.items() if name in names}
    of_start = {"start_timeout_s": 240.0, "call_timeout_s": 240.0}
    of_start |= {name: value for name, value in values.items() if name not in names}
    return SGLangEngine.start(
        EngineSettings(model_path=folder, tp_size=tp_size, dtype="float32", device="cpu", **settings), **of_start
    )


def sampling(count: int, **kwargs: Any) -> SamplingParams:
    """`count` tokens, whatever they are."""
    return SamplingParams(max_new_tokens=count, **({"ignore_eos": True} | kwargs))


def error_of(work: Callable[[], Any]) -> tuple[str, str, float]:
    """(type, message, seconds) of the exception that `work` must raise."""
    begin = time.perf_counter()
    try:
        work()
    except BaseException as error:
        return type(error).__name__, str(error), time.perf_counter() - begin
    return "none", "", time.perf_counter() - begin


def after(seconds: float, work: Callable[[], Any]) -> threading.Timer:
    """Run `work` in another thread, later."""
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def kill_last_scheduler(engine: SGLangEngine, tp_size: int) -> None:
    """SIGKILL the engine's highest rank; the schedulers are started first, in rank order."""
    pid = engine._supervisor._started.children.processes[tp_size - 1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def surroundings() -> dict[str, Any]:
    """What an engine must leave in this process and on this machine as it found it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    return {
        "children": [child.pid for child in psutil.Process().children(recursive=True)],
        "threads": sorted(Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")),
        "files": sorted(str(path) for path in Path(tempfile.gettempdir()).iterdir()),
        "shared memory": sorted(path.name for path in Path("/dev/shm").glob("sgl*")),
        "environment": environment,
        "signals": {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGTERM", "SIGQUIT", "SIGINT")},
        "log handlers": [repr(handler) for handler in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What changed, by name."""
    return {name: (before[name], now[name]) for name in before if before[name] != now[name]}


def in_own_process(job: Callable[..., Any], *args: Any, timeout_s: float = 280.0) -> Any:
    """What `job(*args)` returns in a forked process; its error is raised here."""

    def main(env: RankEnvironment) -> bytes:
        torch.set_num_threads(1)
        tempfile.tempdir = tempfile.mkdtemp()
        return pickle.dumps(job(*args))

    return pickle.loads(run_ranks(main, 1, timeout_s=timeout_s)[0])
