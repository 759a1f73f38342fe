"""An engine whose weights are the trainer's memory beside one that copies them, on one GPU, CUDA graphs on.

    python tools/check_alias.py --output docs/benchmarks/alias_h100x1.json

Both run the same steps: memory released and resumed, a change of the trainer's weights, an update, greedy answers.
Equal answers, an equal digest of all parameters, and memory and times of both are what it reports.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_file import Row, installed, timed_row, write
from reshard_engine import write_config
from reshard_sides import HOST, megatron_shard, meta_state
from torch import Tensor

from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.engine import SGLangEngine
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.layout import SourceRank
from mrl.reshard.spec import ModelSpec
from mrl.reshard.synthetic import in_one_buffer
from mrl.reshard.transport import device_number, export_source
from mrl.types import Generation, SamplingParams

_TAGS = ("kv_cache", "weights")
_PROMPTS = [[100 + 37 * row + column for column in range(16)] for row in range(8)]
_GREEDY = SamplingParams(max_new_tokens=64, temperature=0.0, ignore_eos=True)
_ENGINE = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "cuda_graph_max_bs_decode": 8,
    "cuda_graph_max_bs_prefill": 256,
}
_GIB = 2**30
_BOTH = "aliased beside copied"


def qwen2_1_5b(num_layers: int) -> ModelSpec:
    """The shape of Qwen2.5-1.5B."""
    return ModelSpec(
        family="qwen2",
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        attention_bias=True,
    )


class Trainer:
    """One rank's weights in one exported buffer."""

    def __init__(self, spec: ModelSpec) -> None:
        shapes = megatron_shard(spec, meta_state(spec), ParallelLayout(world_size=1), 0)
        self._params = in_one_buffer(shapes, "cuda")
        device = device_number(torch.device("cuda", torch.cuda.current_device()))
        self.source: SourceRank = export_source(
            self._params.items(), rank=0, tp_rank=0, tp_size=1, host=HOST, device=device
        )

    def reset(self) -> None:
        """The first weights: small, norms near 1."""
        self._each(lambda name, param, noise: param.copy_(noise * 0.03 + ("norm" in name)), seed=0)

    def step(self, number: int) -> None:
        """Change every weight, the same way for the same number."""
        self._each(lambda _, param, noise: param.add_(noise * 0.01), seed=number)

    def checksum(self) -> int:
        """Of all bytes."""
        return sum(int(param.view(torch.int16).sum(dtype=torch.int64)) for param in self._params.values())

    def _each(self, change: Callable[[str, Tensor, Tensor], object], seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        for name, param in self._params.items():
            change(name, param, torch.randn(param.shape, generator=generator, device="cuda", dtype=param.dtype))
        torch.cuda.synchronize()


@dataclass
class Seen:
    """What one engine did."""

    start_s: float = 0.0
    capture_s: float = 0.0
    without_graphs: list[Generation] = field(default_factory=list)
    answers: list[list[Generation]] = field(default_factory=list)
    """After the first weights, then after every step."""
    first_update_ms: float = 0.0
    update_ms: list[float] = field(default_factory=list)
    generate_ms: list[float] = field(default_factory=list)
    released_gib: list[float] = field(default_factory=list)
    """In use on the device, by all processes."""
    rollout_gib: list[float] = field(default_factory=list)
    digests: list[dict[str, str]] = field(default_factory=list)
    pulled_gib: float = 0.0
    aliased_gib: float = 0.0


def observe(folder: Path, trainer: Trainer, spec: ModelSpec, *, alias: bool, steps: int) -> Seen:
    """Start an engine, and run the steps with it."""
    seen = Seen()
    trainer.reset()
    begin = time.perf_counter()
    engine = SGLangEngine.start(
        EngineSettings(
            model_path=folder,
            tp_size=1,
            dtype="bfloat16",
            device="cuda",
            context_length=1024,
            max_running_requests=8,
            max_total_tokens=65536,
            mem_fraction_static=0.4,
            alias_weights=alias,
            engine_kwargs=_ENGINE,
        ),
    )
    seen.start_s = time.perf_counter() - begin
    try:
        _run(engine, trainer, {"spec": spec.to_json(), "sources": [trainer.source.to_json()]}, seen, alias, steps)
    finally:
        engine.shutdown()
    return seen


def _run(engine: SGLangEngine, trainer: Trainer, control: dict[str, Any], seen: Seen, alias: bool, steps: int) -> None:
    for number in range(steps + 1):
        engine.release_memory(_TAGS)
        seen.released_gib.append(_in_use_gib())
        if number:
            trainer.step(number)
        engine.resume_memory(["weights"])
        begin = time.perf_counter()
        report = engine.update_weights(control, weight_version=number)
        seen.update_ms.append((time.perf_counter() - begin) * 1e3)
        seen.pulled_gib, seen.aliased_gib = report.bytes / _GIB, report.aliased_bytes / _GIB
        if alias and not number:
            _first_rollout(engine, seen)
        engine.resume_memory(["kv_cache"])
        seen.rollout_gib.append(_in_use_gib())
        begin = time.perf_counter()
        seen.answers.append(engine.generate(_PROMPTS, _GREEDY))
        seen.generate_ms.append((time.perf_counter() - begin) * 1e3)
    seen.first_update_ms = seen.update_ms.pop(0)
    seen.digests = engine.fingerprint_weights()
    before = trainer.checksum()
    engine.poison_weights()
    if trainer.checksum() != before:
        raise RuntimeError("poisoning the engine changed the trainer's weights")


def _first_rollout(engine: SGLangEngine, seen: Seen) -> None:
    """Answers before graphs are captured; then capture them."""
    capture = engine._capture_graphs
    engine._capture_graphs = lambda: None  # type: ignore[method-assign]
    engine.resume_memory(["kv_cache"])
    seen.without_graphs = engine.generate(_PROMPTS, _GREEDY)
    engine._capture_graphs = capture  # type: ignore[method-assign]
    begin = time.perf_counter()
    capture()
    seen.capture_s = time.perf_counter() - begin


def _in_use_gib() -> float:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / _GIB


def _compare(left: Sequence[Generation], right: Sequence[Generation]) -> tuple[float, float]:
    """Share of tokens before the first difference, and the largest log-prob difference among them."""
    same, total, worst = 0, 0, 0.0
    for one, two in zip(left, right, strict=True):
        pairs = list(zip(one.response_ids, two.response_ids, strict=True))
        until = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same, total = same + until, total + len(pairs)
        errors = (abs(one.rollout_log_probs[at] - two.rollout_log_probs[at]) for at in range(until))
        worst = max(worst, *errors, 0.0)
    return same / total, worst


def rows_of_one(seen: Seen, case: str) -> list[Row]:
    """Sizes and times of one engine."""
    changed = [_compare(a, b)[0] for a, b in zip(seen.answers, seen.answers[1:], strict=False)]
    numbers = [
        ("start", seen.start_s, "s"),
        ("capture_after_update", seen.capture_s, "s"),
        ("pulled", seen.pulled_gib, "GiB"),
        ("aliased", seen.aliased_gib, "GiB"),
        ("first_update", seen.first_update_ms, "ms"),
        ("in_use_released_first", seen.released_gib[0], "GiB"),
        ("in_use_released_last", seen.released_gib[-1], "GiB"),
        ("in_use_rollout_first", seen.rollout_gib[0], "GiB"),
        ("in_use_rollout_last", seen.rollout_gib[-1], "GiB"),
        ("tokens_equal_to_last_step", max(changed), "share"),
    ]
    rows = [Row(case=case, metric=metric, value=value, unit=unit) for metric, value, unit in numbers]
    if seen.without_graphs:
        share, error = _compare(seen.without_graphs, seen.answers[0])
        rows.append(Row(case=case, metric="tokens_equal_eager", value=share, unit="share"))
        rows.append(Row(case=case, metric="log_prob_error_eager", value=error, unit="nat"))
    return rows


def rows_of_both(alias: Seen, copy: Seen) -> list[Row]:
    """The two engines beside each other."""
    pairs = [_compare(a, b) for a, b in zip(alias.answers, copy.answers, strict=True)]
    names = ("update", "generate")
    times = [[getattr(seen, f"{name}_ms") for seen in (alias, copy)] for name in names]
    rows = [
        timed_row(_BOTH, f"{name}_ms", *(statistics.median(values) for values in both))
        for name, both in zip(names, times, strict=True)
    ]
    facts = (
        ("tokens_equal", min(share for share, _ in pairs), "share"),
        ("log_prob_error", max(error for _, error in pairs), "nat"),
        ("parameters_equal", float(alias.digests == copy.digests), "1 = yes"),
        ("saved_at_rollout", copy.rollout_gib[-1] - alias.rollout_gib[-1], "GiB"),
    )
    return rows + [
        Row(case="aliased beside copied", metric=name, value=value, unit=unit) for name, value, unit in facts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=28, help="of the model")
    parser.add_argument("--steps", type=int, default=5, help="releases, resumes and updates after the first")
    arguments = parser.parse_args()
    torch.cuda.set_device(0)
    spec = qwen2_1_5b(arguments.layers)
    versions = installed(("torch", "sglang", "torch_memory_saver"))
    trainer, rows, seen = Trainer(spec), [], {}

    def report(more: Callable[[], list[Row]]) -> None:
        try:
            for row in more():
                rows.append(row)
                print(row, flush=True)
                write(arguments.output, "alias", rows, versions)
        except Exception:
            traceback.print_exc()

    with tempfile.TemporaryDirectory() as folder:
        write_config(spec, Path(folder))
        for case, alias in (("aliased", True), ("copied", False)):

            def run(case: str = case, alias: bool = alias) -> list[Row]:
                seen[case] = observe(Path(folder), trainer, spec, alias=alias, steps=arguments.steps)
                return rows_of_one(seen[case], case)

            report(run)
    if len(seen) == 2:
        report(lambda: rows_of_both(seen["aliased"], seen["copied"]))


if __name__ == "__main__":
    main()
