"""`mrl reshard-check`: one layout pair, executed and compared bitwise with SGLang's own weight loaders.

Needs config.json only: the weights are synthetic. Everything runs in one process, on CPU, through the same export,
plan and executor as a training job.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.errors import ReshardError
from mrl.reshard.execute import Puller, open_sources
from mrl.reshard.families import (
    expected_megatron_shape,
    expected_sglang_shape,
    layer_params,
    spec_from_config,
    tensor_shapes,
)
from mrl.reshard.layout import targets_of
from mrl.reshard.plan import Plan, build_plan
from mrl.reshard.spec import ModelSpec
from mrl.reshard.synthetic import SyntheticTrainer, distinct_state, export_layout

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(kw_only=True, frozen=True)
class RankCheck:
    """One engine rank's outcome."""

    plan: Plan
    params: int
    plan_s: float
    pull_s: float
    differing: tuple[str, ...]
    """Parameters that are not bitwise what SGLang's loader makes of the checkpoint."""


@dataclass(kw_only=True, frozen=True)
class CheckReport:
    """Outcome of one layout pair over all engine ranks."""

    spec: ModelSpec
    layout: ParallelLayout
    rollout_tp: int
    rollout_ep: int
    dtype: str
    padded_vocab_size: int
    """Vocabulary rows on the trainer's side, over all tensor parallel ranks."""
    ranks: list[RankCheck] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(not rank.differing for rank in self.ranks)


def run_check(
    config: Mapping[str, Any],
    layout: ParallelLayout,
    *,
    rollout_tp: int,
    rollout_ep: int = 1,
    dtype: str = "bfloat16",
    vocab_multiple: int = 128,
) -> CheckReport:
    """Reshard synthetic weights from every rank of `layout` into every rank of an engine, and compare.

    Args:
        config: parsed config.json.
        rollout_ep: into how many groups the engine's ranks share out the experts.
        vocab_multiple: Megatron's make_vocab_size_divisible_by; times the tensor parallel size.

    Raises:
        ValueError: the layouts do not fit the model, or the plan would not write every byte exactly once.
        ReshardError: the checksum of a pull differs.
    """
    spec = spec_from_config(config)
    _check_layouts(spec, layout, rollout_tp, rollout_ep)
    _check_memory(spec, layout, rollout_tp, _DTYPES[dtype].itemsize)
    state = distinct_state(spec, _DTYPES[dtype])
    multiple = vocab_multiple * layout.tp
    padded_vocab_size = -(-spec.vocab_size // multiple) * multiple
    trainer = export_layout(
        spec, state, layout, padded_vocab_size=padded_vocab_size, host=socket.gethostname(), first_device=-1
    )
    report = CheckReport(
        spec=spec,
        layout=layout,
        rollout_tp=rollout_tp,
        rollout_ep=rollout_ep,
        dtype=dtype,
        padded_vocab_size=padded_vocab_size,
    )
    for tp_rank in range(rollout_tp):
        place = {"tp_rank": tp_rank, "tp_size": rollout_tp, "ep_size": rollout_ep}
        report.ranks.append(_check_rank(config, spec, state, trainer, **place))
    return report


def _check_rank(
    config: Mapping[str, Any],
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    trainer: SyntheticTrainer,
    *,
    tp_rank: int,
    tp_size: int,
    ep_size: int,
) -> RankCheck:
    # Imported here: the reshard package runs without SGLang, and importing it takes many seconds.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mrl.backends.sglang.reference_loader import build_engine_model, load_reference

    dtype = next(iter(state.values())).dtype
    model = build_engine_model(config, tp_rank=tp_rank, tp_size=tp_size, ep_size=ep_size, dtype=dtype)
    params = dict(model.named_parameters())
    start = time.perf_counter()
    plan = build_plan(
        spec,
        trainer.sources,
        targets_of(params.items()),
        tp_rank=tp_rank,
        tp_size=tp_size,
        ep_size=ep_size,
        host=socket.gethostname(),
        device=-1,
    )
    plan_s = time.perf_counter() - start
    result = Puller(plan, open_sources(plan, trainer.sources), params).pull()
    expected = build_engine_model(config, tp_rank=tp_rank, tp_size=tp_size, ep_size=ep_size, dtype=dtype)
    load_reference(expected, state, tp_rank=tp_rank, tp_size=tp_size, ep_size=ep_size)
    return RankCheck(
        plan=plan,
        params=len(params),
        plan_s=plan_s,
        pull_s=result.seconds,
        differing=differing_parameters(model, expected),
    )


def differing_parameters(model: nn.Module, expected: nn.Module) -> tuple[str, ...]:
    """Names of parameters whose bytes differ; NaN equals only the same NaN."""
    wanted = dict(expected.named_parameters())
    return tuple(
        name
        for name, param in model.named_parameters()
        if not torch.equal(param.detach().view(torch.uint8), wanted[name].detach().view(torch.uint8))
    )


def _check_layouts(spec: ModelSpec, layout: ParallelLayout, rollout_tp: int, rollout_ep: int) -> None:
    """ValueError with the sizes if a layout does not divide the model, before SGLang is imported."""
    layout.layers_of(spec.num_hidden_layers, 0)
    if spec.moe:
        layout.experts_of(spec.moe.num_experts, 0)
    prefix = "decoder.layers.0."
    for name in layer_params(spec, "megatron"):
        expected_megatron_shape(spec, prefix + name, tp_size=layout.tp, etp_size=layout.etp)
    expected_sglang_shape(spec, "model.embed_tokens.weight", tp_size=rollout_tp)
    for name in layer_params(spec, "sglang"):
        expected_sglang_shape(spec, "model.layers.0." + name, tp_size=rollout_tp, ep_size=rollout_ep)


def _check_memory(spec: ModelSpec, layout: ParallelLayout, rollout_tp: int, itemsize: int) -> None:
    """Refuse what would not fit: the checkpoint, one copy per replica in shards, and two engine ranks."""
    model = sum(torch.Size(shape).numel() for shape in tensor_shapes(spec).values()) * itemsize
    replicas = layout.dp * layout.cp
    needed = model * (1 + replicas + 2 / rollout_tp)
    available = psutil.virtual_memory().available
    if needed > 0.9 * available:
        raise ValueError(
            f"the check needs about {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; "
            f"lower --layers (now {spec.num_hidden_layers}) or the number of replicas ({replicas})"
        )


def parse_axes(text: str, allowed: Sequence[str]) -> dict[str, int]:
    """{"tp": 2, "pp": 2} from "tp=2,pp=2"; ValueError names what is not understood."""
    axes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, value = item.strip().partition("=")
        if axis not in allowed or axis in axes or not value.isdecimal() or int(value) < 1:
            known = ", ".join(allowed)
            raise ValueError(f"{item!r} in {text!r} is not one of the axes {known} with a size, as in tp=2")
        axes[axis] = int(value)
    return axes


def training_layout(text: str) -> ParallelLayout:
    """The layout of "tp=2,pp=2,vpp=2,cp=1,dp=1,ep=1,etp=1"; absent axes are 1, and vpp=1 is off."""
    axes = parse_axes(text, ("tp", "pp", "vpp", "cp", "dp", "ep", "etp"))
    tp, pp, cp, vpp, ep, etp = (axes.get(axis, 1) for axis in ("tp", "pp", "cp", "vpp", "ep", "etp"))
    world_size = tp * pp * cp * axes.get("dp", 1)
    return ParallelLayout(world_size=world_size, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, vpp=vpp if vpp > 1 else None)


def render(report: CheckReport, console: Console) -> None:
    """Print the report as a table."""
    engine = f"TP{report.rollout_tp}" + (f" x EP{report.rollout_ep}" if report.rollout_ep > 1 else "")
    table = Table(title=f"{report.spec.family}, {report.layout} -> engine {engine}, {report.dtype}")
    columns = ("rank", "params", "copies", "fills", "MB", "sources", "plan ms", "pull ms", "equal")
    for column in columns:
        table.add_column(column, justify="right")
    for rank in report.ranks:
        stats = rank.plan.stats
        table.add_row(
            str(rank.plan.tp_rank),
            str(rank.params),
            str(stats.copies),
            str(stats.fills),
            f"{stats.bytes / 1e6:.2f}",
            str(len(stats.bytes_by_source)),
            f"{rank.plan_s * 1e3:.1f}",
            f"{rank.pull_s * 1e3:.1f}",
            "no" if rank.differing else "yes",
        )
    console.print(table)
    if report.ok:
        console.print(
            "Every destination byte is written exactly once, every checksum agrees, every parameter is bitwise equal."
        )
    for rank in report.ranks:
        for name in rank.differing:
            console.print(f"engine rank {rank.plan.tp_rank}: {name} differs from what SGLang's loader makes of it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if equal, 1 if a parameter or checksum differs, 2 if the request cannot be run."""
    arguments = _parser().parse_args(argv)
    try:
        rollout = parse_axes(arguments.rollout, ("tp", "ep"))
        report = run_check(
            _read_config(arguments.model, arguments.layers),
            training_layout(arguments.train),
            rollout_tp=rollout.get("tp", 1),
            rollout_ep=rollout.get("ep", 1),
            dtype=arguments.dtype,
            vocab_multiple=arguments.vocab_multiple,
        )
    except ValueError as error:
        Console(stderr=True).print(f"reshard-check: {error}", markup=False)
        return 2
    except ReshardError as error:
        Console(stderr=True).print(f"reshard-check: {error}", markup=False)
        return 1
    render(report, Console())
    return 0 if report.ok else 1


def _read_config(model: Path, layers: int | None) -> dict[str, Any]:
    path = model / "config.json"
    if not path.is_file():
        raise ValueError(f"{model} is not a Hugging Face model folder: {path} does not exist")
    config = json.loads(path.read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
        # One entry per layer; the families refuse anything but full attention.
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][:layers]
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrl reshard-check", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder; only config.json is read")
    parser.add_argument("--train", default="tp=1", help="training layout: tp, pp, vpp, cp, dp, ep, etp; as tp=2,pp=2")
    parser.add_argument("--rollout", default="tp=1", help="engine layout: tp, ep, as tp=2")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--layers", type=int, help="use this many layers instead of the model's, to save memory")
    parser.add_argument("--vocab-multiple", type=int, default=128, help="Megatron's make_vocab_size_divisible_by")
    return parser
