"""The whole weight update of a real SGLang engine on one GPU, and the same update the usual ways."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_file import Row, timed_row
from gpu_workers import State
from reshard_peers import FLAT_BUCKET_BYTES, PER_TENSOR_BUCKET_BYTES, buckets
from reshard_sides import hold
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from mrl.backends.sglang.arguments import EngineSettings
from mrl.backends.sglang.engine import SGLangEngine
from mrl.interfaces import WeightUpdateReport
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import ModelSpec

_CASE = "TP1 -> SGLang engine of TP1"
_ENGINE = {"disable_cuda_graph": True, "attention_backend": "triton", "sampling_backend": "pytorch"}
"""Only what weights need: an engine that starts soon."""


def measure_engine(spec: ModelSpec, copy_rate: float, repeats: int) -> list[Row]:
    """Times of the update call, its parts and the usual ways; SGLang's own loader must give the same bits as the pull.

    Args:
        copy_rate: of this GPU's memory, one way, in GB/s.
    """
    state: State = {}
    layout = ParallelLayout(world_size=1)
    source = hold(state, spec=spec, layout=layout, rank=0, known_values=False)
    control = {"spec": spec.to_json(), "sources": [source.to_json()]}
    with tempfile.TemporaryDirectory() as folder:
        write_config(spec, Path(folder))
        engine = SGLangEngine.start(
            EngineSettings(
                model_path=folder,
                tp_size=1,
                dtype="bfloat16",
                device="cuda",
                context_length=1024,
                max_running_requests=16,
                max_total_tokens=4096,
                mem_fraction_static=0.7,
                engine_kwargs=_ENGINE,
            ),
        )
    try:
        return _measure(engine, control, state, copy_rate, repeats)
    finally:
        engine.shutdown()


def _measure(engine: SGLangEngine, control: dict[str, Any], state: State, copy_rate: float, repeats: int) -> list[Row]:
    engine.poison_weights()
    first = engine.update_weights(control, weight_version=0)
    reports = [engine.update_weights(control, weight_version=1 + index) for index in range(repeats + 2)][2:]
    pulled = engine.fingerprint_weights()
    flush = _median_ms(lambda: engine.release_memory([]), repeats)
    engine.poison_weights()
    _send(engine, state, flat=False)
    if engine.fingerprint_weights() != pulled:
        raise RuntimeError("SGLang's own loader gives other parameters than the pull")
    ways = {"per_tensor_ipc_ms": False, "flattened_buckets_ms": True}
    peers = {name: _median_ms(partial(_send, engine, state, flat), 4) for name, flat in ways.items()}
    return _rows(first, reports, flush, copy_rate, peers)


def _rows(
    first: WeightUpdateReport,
    reports: list[WeightUpdateReport],
    flush: float,
    copy_rate: float,
    peers: dict[str, float],
) -> list[Row]:
    call, pull = (statistics.median(getattr(report, name) for report in reports) * 1e3 for name in ("call_s", "pull_s"))
    limit = first.bytes / copy_rate / 1e6
    times = {"first_update_ms": first.call_s * 1e3, "flush_ms": flush, "update_without_pull_ms": call - pull}
    return [
        timed_row(_CASE, "update_ms", call, limit, **peers),
        timed_row(_CASE, "pull_ms", pull, limit),
        *(Row(case=_CASE, metric=metric, value=value, unit="ms") for metric, value in times.items()),
        Row(case=_CASE, metric="faster_than_best_peer", value=min(peers.values()) / call, unit="x"),
    ]


def _send(engine: SGLangEngine, state: State, flat: bool) -> None:
    for bucket in buckets(state["trainer"], {}, FLAT_BUCKET_BYTES if flat else PER_TENSOR_BUCKET_BYTES, flat=flat):
        payload: Any = bucket
        if flat:
            flattened = FlattenedTensorBucket(named_tensors=bucket)
            payload = {"flattened_tensor": flattened.get_flattened_tensor(), "metadata": flattened.get_metadata()}
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[MultiprocessingSerializer.serialize(payload)],
            load_format="flattened_bucket" if flat else None,
            flush_cache=False,
        )
        # The engine offers no way to send tensors, on purpose.
        manager = engine._supervisor.manager
        ok, message = engine._call(manager.update_weights_from_tensor(request, None), "update_weights")
        if not ok:
            raise RuntimeError(f"SGLang refused a bucket: {message}")


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def write_config(spec: ModelSpec, folder: Path) -> None:
    """Make `folder` a Hugging Face folder of that shape, without weights."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": spec.family,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    fields = spec.to_json()
    for name in ("family", "head_dim", "attention_bias"):
        fields.pop(name)
    (folder / "config.json").write_text(json.dumps(config | fields))
