"""Every family against transformers: log-probs in several layouts, weights there and back, generation by SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sglang_jobs as jobs
import torch
import torch.distributed as dist
from family_configs import FAMILY_CONFIGS
from megatron_reference import (
    OPTIMIZER,
    TEMPERATURE,
    gather_hf_tensors,
    load_reference,
    make_batch,
    policy_loss,
    save_random_model,
)
from ranks import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor

from mrl.backends.megatron.engine import MegatronEngine
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.backends.sglang.preload import preload_sglang
from mrl.convert.dist_checkpoint import DistCheckpoint
from mrl.parallel.agreement import gather_results
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.families import families
from mrl.reshard.spec import load_spec
from mrl.types import MicroBatchLimit

BATCH = make_batch(500, 5, seed=3)
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
    {"tp": 4, "sequence_parallel": True},
)
MOE_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "sequence_parallel": True},
    {"ep": 4},
    {"tp": 2, "ep": 4, "sequence_parallel": True},
    {"tp": 2, "sequence_parallel": True},
    {"ep": 2, "etp": 2},
    {"tp": 2, "etp": 4, "sequence_parallel": True},
)
# Log-probs of magnitude 6 through 4 layers in float32.
LOG_PROB_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("families")
    return {name: save_random_model(folder / name, config) for name, config in FAMILY_CONFIGS.items()}


def has_experts(family: str) -> bool:
    return families()[family].experts is not None


def expected_log_probs(models: dict[str, str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: load_reference(path).outputs(BATCH)["log_probs"] for name, path in models.items()}


def log_probs_and_weights(path: str, layout: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs, weights read from the exported memory, and weights written as a Hugging Face folder and read again."""
    spec = load_spec(path)
    engine = build_engine(
        RoleSetup(
            kind="reference",
            model_path=path,
            spec=spec,
            layout=ParallelLayout(world_size=dist.get_world_size(), **layout),
            temperature=TEMPERATURE,
        )
    )
    log_probs, gathered = (
        engine.compute_log_probs(BATCH, limit=MicroBatchLimit(samples=2)),
        gather_hf_tensors(engine, spec),
    )
    folder = Path(path) / f"exported {engine.layout}"
    folder.mkdir(exist_ok=True)
    export = engine.stage_hugging_face(folder, in_background=True)
    export.write()
    export.finish()
    dist.barrier()
    engine.close()
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return log_probs, gathered, written


def test_log_probs_equal_transformers_and_weights_come_back_bitwise(models) -> None:
    def run_all() -> dict[str, list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]]:
        return {
            name: [log_probs_and_weights(path, layout) for layout in (MOE_LAYOUTS if has_experts(name) else LAYOUTS)]
            for name, path in models.items()
        }

    expected = run_on_ranks(lambda: expected_log_probs(models), 1)[0]
    for name, results in run_on_ranks(run_all, 4)[0].items():
        saved = load_file(Path(models[name]) / "model.safetensors")
        for log_probs, *copies in results:
            torch.testing.assert_close(
                log_probs, expected[name], atol=LOG_PROB_TOLERANCE, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )
            for weights in copies:
                assert weights.keys() == saved.keys()
                assert all(torch.equal(weights[tensor], saved[tensor]) for tensor in saved), name


def trained_experts(path: str) -> MegatronEngine:
    layout = ParallelLayout(world_size=2, ep=2)
    return build_engine(
        RoleSetup(kind="actor", model_path=path, spec=load_spec(path), layout=layout, optimizer=OPTIMIZER)
    )


def test_a_checkpoint_of_experts_names_their_norm_as_transformer_engine_does(models, tmp_path) -> None:
    def run() -> None:
        staged = trained_experts(models["mixtral"]).stage_checkpoint(tmp_path, in_background=False)
        gather_results(staged.write)
        staged.finish()

    run_on_ranks(run, 2)
    keys = {key.removeprefix("decoder.layers.") for key in DistCheckpoint(tmp_path).tensors}
    # There no linear layer follows it that it could be fused with, unlike the one before attention.
    assert {"pre_mlp_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"} <= keys


def test_a_gradient_that_is_infinite_in_one_expert_only_stops_the_step(models) -> None:
    def run() -> str:
        engine = trained_experts(models["mixtral"])
        for name, parameter in engine.named_parameters():
            # Rank 1 has experts 2 and 3.
            if name == "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight":
                parameter.register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(FloatingPointError) as error:
            engine.update(BATCH, policy_loss(BATCH), limit=MicroBatchLimit(samples=2), with_entropy=True)
        return str(error.value)

    assert ["rank 1 has gradients that are not finite" in message for message in run_on_ranks(run, 2)] == [True] * 2


def generate(folder: str, tp_size: int) -> tuple[list[list[int]], list[list[int]], float]:
    trained = jobs.TrainedEngine(Path(folder), tp_size=tp_size)
    try:
        ours = trained.engine.generate(jobs.PROMPTS, jobs.sampling(16, temperature=0.0))
        return (
            [list(each.response_ids) for each in ours],
            jobs.greedy(trained.model, 16),
            trained.log_prob_error(ours, 1.0),
        )
    finally:
        trained.engine.shutdown()


def test_expert_parallelism_in_an_engine_on_cpu_is_refused(models) -> None:
    with pytest.raises(ValueError, match="ep_size = 2: SGLang on CPU has no expert parallelism"):
        jobs.start(Path(models["mixtral"]), tp_size=2, engine_kwargs={"ep_size": 2})


@pytest.mark.engine
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_generation_after_a_reshard_equals_transformers(models, family) -> None:
    preload_sglang()
    ours, expected, log_prob_error = jobs.in_own_process(generate, models[family], 2)
    assert ours == expected
    # fp32 on both sides, as above.
    assert log_prob_error < LOG_PROB_TOLERANCE
