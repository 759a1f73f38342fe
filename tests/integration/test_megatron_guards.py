"""Errors of bad input, and the guards against megatron's silent wrong numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_reference import OPTIMIZER, make_batch, policy_loss, save_tiny_model
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.hf_weights import load_weights
from mrl.backends.megatron.inputs import padded_inputs
from mrl.backends.megatron.model import Recompute, transformer_config
from mrl.backends.megatron.optimizer import DataParallelSettings, OptimizerSettings, check_adam, megatron_optimizer
from mrl.backends.megatron.role_state import RoleState
from mrl.backends.megatron.schedule import MicroBatch, check_pipeline_config
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.launch.fork import RankFailure
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.types import Metric, MicroBatchLimit

VOCAB = 250
PAIRS = MicroBatchLimit(samples=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", vocab_size=VOCAB, kv_heads=4)


def role(path: str, world_size: int, **options: Any) -> RoleSetup:
    layout = {key: options.pop(key) for key in ("tp", "pp", "vpp", "cp", "sequence_parallel") if key in options}
    fields: dict[str, Any] = {"kind": "actor", "optimizer": OPTIMIZER, **options}
    return RoleSetup(
        model_path=path, spec=load_spec(path), layout=ParallelLayout(world_size=world_size, **layout), **fields
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 16}, "tensor_model_parallel_size = 16 does not fit num_attention_heads = 8"),
        ({"pp": 16}, "pipeline_model_parallel_size = 16 does not divide num_hidden_layers = 4"),
        ({"pp": 4, "vpp": 4}, "virtual_pipeline_model_parallel_size = 16 does not divide num_hidden_layers = 4"),
        ({"cp": 2}, "context_parallel_size = 2 shares packed sequences only; set use_remove_padding=True"),
        ({"dtype": "float16"}, "dtype = 'float16' is not supported"),
        ({"kind": "reference"}, "a reference is not trained; its optimizer must be None"),
    ],
)
def test_impossible_setups_are_refused_before_anything_is_built(model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        role(model, 16, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_lr": 1.0}, "min_lr"),
        ({"lr_decay_style": "cosine", "lr_warmup_steps": 5, "lr_decay_steps": 5}, "lr_decay_steps"),
        ({"lr_decay_style": "linear"}, "lr_decay_steps"),
    ],
)
def test_impossible_learning_rates_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(lr=0.1, **fields)


def test_overlapped_gather_needs_the_distributed_optimizer() -> None:
    with pytest.raises(ValueError, match="overlap_param_gather needs use_distributed_optimizer"):
        DataParallelSettings(overlap_param_gather=True)


def _without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "holds no weights"


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _with_missing_tensor(folder: Path) -> str:
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    return "model.layers.2.mlp.up_proj.weight is missing"


def _with_wrong_shape(folder: Path) -> str:
    _rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    return r"model.norm.weight has shape \[7\], but config.json gives \[128\]"


def _with_garbage(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    return "cannot be read as safetensors"


@pytest.mark.parametrize("spoil", [_without_weights, _with_missing_tensor, _with_wrong_shape, _with_garbage])
def test_bad_folders_name_what_is_wrong(model, tmp_path, spoil) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(model, folder)
    message = spoil(folder)
    norm = torch.nn.Parameter(torch.zeros(128))
    with pytest.raises(ValueError, match=message):
        load_weights(folder, load_spec(folder), [("decoder.final_layernorm.weight", norm)], tp_rank=0, tp_size=1)


def test_a_bad_folder_is_a_user_error_of_the_job(model, tmp_path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(model, folder)
    message = _with_missing_tensor(folder)
    with pytest.raises(RankFailure, match=message) as failure:
        run_on_ranks(lambda: build_engine(role(str(folder), 2, tp=2)), 2)
    assert failure.value.user_error


def test_padded_vocabulary_rows_are_zero(model) -> None:
    # 250 rows over 4 ranks are 63 each, and the last 2 are padding.
    shard = torch.nn.Parameter(torch.full((63, 128), torch.nan))
    load_weights(model, load_spec(model), [("output_layer.weight", shard)], tp_rank=3, tp_size=4)
    expected = load_file(Path(model) / "model.safetensors")["lm_head.weight"][189:]
    assert torch.equal(shard[:61], expected)
    assert torch.equal(shard[61:], torch.zeros(2, 128))


def test_a_layout_for_another_world_size_is_refused(model) -> None:
    with pytest.raises(RankFailure, match="is for 8 ranks, not 1"):
        run_on_ranks(lambda: build_engine(role(model, 8, tp=2)), 1)


def test_interleaving_with_batched_exchange_is_refused(model) -> None:
    layout = ParallelLayout(world_size=2, pp=2, vpp=2)
    config = transformer_config(load_spec(model), layout, dtype=torch.float32, recompute=Recompute())
    check_pipeline_config(config)
    config.batch_p2p_comm = True
    with pytest.raises(ValueError, match="exchange activations in the wrong order"):
        check_pipeline_config(config)


def test_adam_without_a_resumable_step_is_refused(monkeypatch) -> None:
    check_adam()
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    with pytest.raises(RuntimeError, match=r"torch\.optim\.AdamW"):
        check_adam()


def test_padded_inner_buckets_are_refused(model, tmp_path) -> None:
    # Every parameter gets a bucket of its own, padded to a multiple of 128: norms of 64 elements need it.
    settings = DataParallelSettings(use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=50)
    narrow = save_tiny_model(tmp_path, "qwen2", vocab_size=VOCAB, kv_heads=4, hidden_size=64)

    def build() -> None:
        build_engine(role(model, 2, data_parallel=settings)).close()
        build_engine(role(narrow, 2, data_parallel=replace(settings, resumable=False))).close()
        with pytest.raises(ValueError, match="is padded from 64 to 128 elements"):
            build_engine(role(narrow, 2, data_parallel=settings))

    run_on_ranks(build, 2)


def test_state_of_roles_does_not_nest() -> None:
    with RoleState(), pytest.raises(RuntimeError, match="do not nest"), RoleState():
        pass


def test_the_schedule_refuses_what_megatron_gets_wrong(model) -> None:
    def check() -> None:
        interleaved = build_engine(role(model, 2, pp=2, vpp=2))._parts.schedule
        batch = make_batch(VOCAB, 1, seed=0)
        item = MicroBatch(batch=batch, inputs=padded_inputs(batch), indices=[0])
        with pytest.raises(ValueError, match="multiple of pipeline_model_parallel_size = 2 micro-batches, not 3"):
            interleaved.forward([item] * 3, lambda output, item: None)
        sequence_parallel = build_engine(role(model, 2, tp=2, sequence_parallel=True))._parts.schedule
        narrow = batch.with_fields(lengths=torch.tensor([23])).trim()
        odd = MicroBatch(batch=narrow, inputs=padded_inputs(narrow), indices=[0])
        with pytest.raises(ValueError, match="multiple of tensor_model_parallel_size = 2 tokens, not 23"):
            sequence_parallel.forward([odd], lambda output, item: None)

    run_on_ranks(check, 2)


def weights_of(engine: MegatronEngine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, parameter in engine.named_parameters()]


def test_failing_losses_raise_on_every_rank_and_change_nothing(model) -> None:
    batch = make_batch(VOCAB, 4, seed=1)
    good = policy_loss(batch)

    def raising(output: Any, micro_batch: Any) -> Any:
        raise KeyError("no such field")

    def not_a_number(output: Any, micro_batch: Any) -> Any:
        loss, metrics = good(output, micro_batch)
        return loss * torch.nan, metrics

    def taking_a_name(output: Any, micro_batch: Any) -> Any:
        loss, _ = good(output, micro_batch)
        return loss, {"lr": Metric(loss.detach())}

    def check() -> dict[str, float]:
        engine = build_engine(role(model, 4, tp=2, pp=2))
        before = weights_of(engine)
        for loss_fn, error in ((raising, KeyError), (not_a_number, FloatingPointError), (taking_a_name, ValueError)):
            with pytest.raises(error):
                engine.update(batch, loss_fn, limit=PAIRS, with_entropy=True)
        torch.testing.assert_close(weights_of(engine), before, atol=0, rtol=0)
        return engine.update(batch, good, limit=PAIRS, with_entropy=True)

    results = run_on_ranks(check, 4)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    "data_parallel", [DataParallelSettings(), DataParallelSettings(use_distributed_optimizer=True)]
)
def test_gradient_norm_is_reported_with_clipping_off(model, data_parallel) -> None:
    batch = make_batch(VOCAB, 4, seed=1)

    def first_norm(clip_grad: float) -> float:
        setup = role(model, 2, data_parallel=data_parallel, optimizer=replace(OPTIMIZER, clip_grad=clip_grad))
        return build_engine(setup).update(batch, policy_loss(batch), limit=PAIRS, with_entropy=True)["grad_norm"]

    clipped, free = run_on_ranks(lambda: (first_norm(0.1), first_norm(0.0)), 2)[0]
    assert clipped == free > 0.1


def test_exported_parameters_must_not_move(model) -> None:
    def check() -> None:
        engine = build_engine(role(model, 1))
        assert len(engine.export_weights().buffers) == 1
        _, parameter = next(engine.named_parameters())
        parameter.data = parameter.data.clone()
        with pytest.raises(AssertionError, match="were moved"):
            engine.export_weights()

    run_on_ranks(check, 1)


def test_closing_twice_is_harmless_and_frees_the_groups(model) -> None:
    def check() -> int:
        engine = build_engine(role(model, 2, tp=2))
        engine.close()
        engine.close()
        return len(dist.distributed_c10d._world.pg_map)

    assert run_on_ranks(check, 2) == [1, 1]


def test_settings_are_plain_values(model) -> None:
    setup = role(model, 1)
    assert replace(setup, seed=1).spec == setup.spec
