"""A reward model on Megatron: the same scores as transformers' classifiers in every layout, and a run with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from cli_jobs import run_command
from ranks import run_on_ranks

from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.data.embedded import build_embedded_tokenizer
from mrl.data.tokenizer import load_tokenizer
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_classifier_spec
from mrl.trainer.reward_model import RewardModelStage, load_encoder
from mrl.types import Generation, MicroBatchLimit, Prompt, Sample

FAMILIES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}


def save_classifier(folder: Path, family: str, *, num_labels: int = 1) -> Path:
    """A random classifier of the embedded task's tokens, with its tokenizer."""
    torch.manual_seed(7)
    config = FAMILIES[family](
        vocab_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=num_labels,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    build_embedded_tokenizer().save_pretrained(folder)
    return folder


def make_samples() -> list[Sample]:
    generation = Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1)
    return [
        Sample(
            prompt=Prompt(
                uid=question, token_ids=[1], messages=[{"role": "user", "content": question}], data_source="s"
            ),
            generation=generation,
            response_text=answer,
            reward=0.0,
        )
        for question, answer in (("345", "6789"), ("5", "6"), ("34", ""), ("1234", "567"), ("7", "8989898989"))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers_classifier_in_every_layout(tmp_path, family):
    folder = save_classifier(tmp_path / family, family)
    spec = load_classifier_spec(folder)
    encoder = load_encoder(folder, load_tokenizer(folder), max_length=spec.max_position_embeddings)

    def expected() -> list[float]:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return [model(torch.tensor([encoder.encode(sample)])).logits.item() for sample in make_samples()]

    def score() -> list[list[float]]:
        results = []
        for layout in ({"tp": 2, "sequence_parallel": True}, {"pp": 2}, {}):
            setup = RoleSetup(
                kind="reward_model",
                model_path=str(folder),
                spec=spec,
                layout=ParallelLayout(world_size=dist.get_world_size(), **layout),
            )
            engine = build_engine(setup)
            limit = MicroBatchLimit(samples=2)
            stage = RewardModelStage(engine=engine, encoder=encoder, limit=limit, weight=1.0, on_failure="raise")
            results.append([sample.reward for sample in stage.score(make_samples())])
            engine.close()
        return results

    reference = run_on_ranks(expected, 1)[0]
    assert max(reference) - min(reference) > 0.1, "the scores have to differ"
    for by_layout in run_on_ranks(score, 2):
        for ours in by_layout:
            # float32 through four layers.
            assert ours == pytest.approx(reference, abs=1e-4)


@pytest.mark.e2e
def test_a_run_adds_the_model_s_scores_in_training_and_validation(tmp_path):
    folder = save_classifier(tmp_path / "model", "llama")
    arguments = [
        "--config-name=demo",
        f"trainer.default_local_dir={tmp_path / 'run'}",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=1",
        "trainer.test_freq=1",
        "data.train_batch_size=4",
        "data.val_max_samples=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1",
        "critic.ppo_micro_batch_size_per_gpu=2",
        "algorithm.use_kl_in_reward=False",
        "reward.functions.rule.weight=2",
        "reward.reward_model.enable=True",
        f"reward.reward_model.model_path={folder}",
        "reward.reward_model.micro_batch_size_per_gpu=2",
        "reward.reward_model.weight=0.5",
        "reward.reward_model.megatron.pipeline_model_parallel_size=2",
        "reward.reward_model.megatron.dtype=float32",
    ]
    outcome = run_command(arguments, tmp_path)
    assert outcome.status == 0, outcome.output
    assert "reward model" in outcome.output
    first, last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    expected = 2 * last["reward/rule"] + 0.5 * last["reward/reward_model"]
    assert last["reward/mean"] == pytest.approx(expected, abs=1e-6)
    assert last["reward/reward_model/failed"] == 0.0
    assert last["time/reward_model_s"] > 0.0
    for step, row in ((0, first), (1, last)):
        lines = (tmp_path / f"run/samples/val/{step}.jsonl").read_text().splitlines()
        rewards = [
            2 * info["rule"] + 0.5 * info["reward_model"]
            for info in (json.loads(line)["reward_info"] for line in lines)
        ]
        assert row["val/reward_mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)


def test_a_model_that_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
        load_classifier_spec(save_classifier(tmp_path / "two", "llama", num_labels=2))
    folder = save_classifier(tmp_path / "one", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"not a \*ForSequenceClassification model"):
        load_classifier_spec(folder)
