"""Three whole PPO steps in every layout against a single-process PPO written with transformers.

The samples are recorded ones, so that all runs see the same; everything after the rollout is the trainer's own loop
over real engines: log-probs, reference, values, KL in reward and in the loss, GAE, whitening, mini-batches, updates.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from megatron_reference import TEMPERATURE, Reference, gather_hf_tensors, load_reference, save_tiny_model
from ranks import run_on_ranks

from mrl.algorithms.estimators.gae import GAE
from mrl.algorithms.kl import AdaptiveKLController
from mrl.algorithms.objectives import PolicyObjective, ValueObjective
from mrl.algorithms.policy_losses import PolicyLoss
from mrl.algorithms.policy_losses.kl_cov import KLCov
from mrl.algorithms.policy_losses.vanilla import Vanilla
from mrl.algorithms.rollout_correction import Rejection, RolloutCorrection, Weighting
from mrl.backends.megatron.optimizer import DataParallelSettings, OptimizerSettings
from mrl.backends.megatron.setup import RoleSetup, build_engine
from mrl.data.loader import PromptLoader
from mrl.observability.trackers import TrackerList
from mrl.parallel.layout import ParallelLayout
from mrl.reshard.spec import load_spec
from mrl.trainer.advantages import AdvantageStage
from mrl.trainer.collection import SampleCollector
from mrl.trainer.correction import CorrectionStage
from mrl.trainer.phases import PhaseSwitch
from mrl.trainer.ppo import ActorRole, CriticRole, LoopSettings, PPOTrainer, ReferenceRole
from mrl.trainer.samples import SampleWriter
from mrl.trainer.scoring import Scorer
from mrl.trainer.updates import UpdateSchedule
from mrl.trainer.validation import Validator
from mrl.types import Generation, MicroBatchLimit, Prompt, Sample, SamplingParams

VOCAB, NUM_PROMPTS, STEPS, EPOCHS, MINI = 250, 12, 3, 1, 6
GAMMA, LAM, KL_COEF, TARGET_KL, HORIZON = 0.99, 0.95, 0.1, 0.05, 40
CLIP_LOW, CLIP_HIGH, CLIP_C, CLIP_VALUE = 0.1, 0.15, 1.5, 0.2
ENTROPY_COEFF, KL_LOSS_COEF = 0.01, 0.05
ACTOR_LR, CRITIC_LR, EPS, DECAY, CLIP_GRAD = 1e-3, 2e-3, 1e-3, 0.1, 0.5

# About the model's mean, so that ratios of tokens and of sequences lie on both sides of 1.
ROLLOUT_LOG_PROB = -6.6
CLIPPED = Vanilla(clip_ratio_low=CLIP_LOW, clip_ratio_high=CLIP_HIGH, clip_ratio_c=CLIP_C)
NO_CORRECTION = CorrectionStage()

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "tp2 pp2 dp2, critic tp1 pp2 dp4": ({"tp": 2, "pp": 2, "sequence_parallel": True}, {"pp": 2}, False),
    "tp4 pp1 dp2, critic tp2 pp2 dp2": ({"tp": 4}, {"tp": 2, "pp": 2}, False),
    "packed: pp4 vpp2 dp2, critic tp4 dp2": ({"pp": 4, "vpp": 2}, {"tp": 4, "sequence_parallel": True}, True),
    "packed: pp2 vpp2 cp2 dp2, critic tp2 cp4": (
        {"pp": 2, "vpp": 2, "cp": 2},
        {"tp": 2, "cp": 4, "sequence_parallel": True},
        True,
    ),
}

# Losses and norms are of size 0.1 to 2; 6 updates of fp32 rounding through 8 layers and Adam.
METRIC_TOLERANCE = 5e-5
# A weight moves by up to 6e-3 in these steps.
WEIGHT_TOLERANCE = 5e-5


@dataclass
class Recorded:
    """Implements `mrl.interfaces.Rollout` by handing out samples made beforehand."""

    steps: list[list[Sample]]
    metrics: dict[str, float] = field(default_factory=dict)

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> list[Sample]:
        return self.steps.pop(0)

    def update_weights(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class NoText:
    def batch_decode(self, sequences, *, skip_special_tokens):
        return ["" for _ in sequences]


def record(seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, VOCAB, (length,), generator=generator).tolist()

    samples = []
    for row in range(NUM_PROMPTS):
        response = ids(1, 12)
        prompt = Prompt(uid=str(row), token_ids=ids(2, 8), messages=[], data_source="recorded")
        generation = Generation(
            response_ids=response,
            rollout_log_probs=[ROLLOUT_LOG_PROB] * len(response),
            finish_reason="stop",
            weight_version=0,
        )
        samples.append(Sample(prompt=prompt, generation=generation))
    return samples


def score(samples: list[Sample]) -> list[tuple[float, dict[str, float]]]:
    return [(sum(sample.generation.response_ids) % 17 / 8 - 1, {}) for sample in samples]


def setups(
    folders: dict[str, str], actor: dict[str, Any], critic: dict[str, Any], world_size: int, *, packed: bool = False
) -> list[RoleSetup]:
    def setup(kind: str, axes: dict[str, Any], lr: float | None) -> RoleSetup:
        path = folders["critic" if kind == "critic" else "actor"]
        optimizer = lr and OptimizerSettings(lr=lr, eps=EPS, weight_decay=DECAY, clip_grad=CLIP_GRAD)
        return RoleSetup(
            kind=kind,
            model_path=path,
            spec=load_spec(path),
            layout=ParallelLayout(world_size=world_size, **axes),
            temperature=TEMPERATURE,
            optimizer=optimizer or None,
            data_parallel=DataParallelSettings(use_distributed_optimizer=kind == "actor"),
            value_head_std=0.05,
            packed=packed,
        )

    return [setup("actor", actor, ACTOR_LR), setup("critic", critic, CRITIC_LR), setup("reference", actor, None)]


def train(
    folders: dict[str, str],
    actor_axes: dict[str, Any],
    critic_axes: dict[str, Any],
    world_size: int,
    *,
    policy_loss: PolicyLoss = CLIPPED,
    correction: CorrectionStage = NO_CORRECTION,
    packed: bool = False,
    critic_epochs: int = EPOCHS,
    critic_warmup: int = 0,
) -> Any:
    """Metrics of every step and the actor's final weights (those on rank 0)."""
    roles = setups(folders, actor_axes, critic_axes, world_size, packed=packed)
    actor, critic, reference = (build_engine(setup) for setup in roles)
    steps = [record(seed) for seed in range(STEPS)]
    prompts = [sample.prompt for sample in steps[0]]
    rollout = Recorded(steps)
    scorer = Scorer(score, NoText(), source_rank=0)
    sampling = SamplingParams(max_new_tokens=12)
    schedule = UpdateSchedule(
        mini_batch_size=MINI,
        update_limit=MicroBatchLimit(tokens=24) if packed else MicroBatchLimit(samples=2),
        forward_limit=MicroBatchLimit(samples=3),
        epochs=EPOCHS,
        shuffle=False,
        seed=0,
    )
    trainer = PPOTrainer(
        settings=LoopSettings(
            critic_warmup=critic_warmup, total_steps=STEPS, test_freq=-1, val_before_train=False, val_only=False
        ),
        collector=SampleCollector(
            prompts=PromptLoader(prompts, batch_size=NUM_PROMPTS, shuffle=False, seed=0),
            rollout=rollout, scorer=scorer, sampling=sampling, n_samples_per_prompt=1,
            n_prompts=NUM_PROMPTS,
        ),
        phases=PhaseSwitch(rollout=rollout, roles=(), engine_tags=()),
        actor=ActorRole(engine=actor, schedule=schedule, objective=PolicyObjective(
            policy_loss=policy_loss, correction=correction.correction if correction.bypass_mode else None,
            entropy_coeff=ENTROPY_COEFF, use_kl_loss=True, kl_loss_coef=KL_LOSS_COEF,
            kl_loss_type="low_var_kl",
        )),
        critic=CriticRole(
            engine=critic, schedule=replace(schedule, epochs=critic_epochs),
            objective=ValueObjective(cliprange_value=CLIP_VALUE),
        ),
        reference=ReferenceRole(engine=reference, limit=MicroBatchLimit(samples=4)),
        reward_model=None,
        correction=correction,
        advantages=AdvantageStage(
            estimator=GAE(gamma=GAMMA, lam=LAM), kl_penalty="kl", n_samples_per_prompt=1,
            kl_controller=AdaptiveKLController(KL_COEF, target_kl=TARGET_KL, horizon=HORIZON * NUM_PROMPTS),
        ),
        pad_token_id=0,
        validator=Validator(
            prompts=(), batch_size=None, rollout=rollout, scorer=scorer, sampling=sampling, n_samples_per_prompt=1,
            sample_writer=SampleWriter(None), num_logged=0,
        ),
        sample_writer=SampleWriter(None), trackers=TrackerList([]),
    )  # fmt: skip
    log = [trainer.step(step) for step in range(1, STEPS + 1)]
    return log, gather_hf_tensors(actor, load_spec(folders["actor"]))


# ---- the same algorithm for one process, sample by sample, in transformers and torch.optim


def token_outputs(model: Reference, sample: Sample) -> dict[str, torch.Tensor]:
    """Outputs at the response tokens of one sample. [response]"""
    tokens = torch.tensor([[*sample.prompt.token_ids, *sample.generation.response_ids]])
    batch = type("Batch", (), {"tokens": tokens, "lengths": torch.tensor([tokens.shape[1]])})
    start = len(sample.prompt.token_ids)
    return {name: value[0, start:] for name, value in model.outputs(batch).items()}


def advantages_of(rewards: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    advantages, later = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        later = rewards[t] + GAMMA * following - values[t] + GAMMA * LAM * later
        advantages[t] = later
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def policy_terms(new: torch.Tensor, row: dict[str, Any], entropy: torch.Tensor) -> torch.Tensor:
    """Token losses of one sample: dual-clipped surrogate, entropy bonus, k3 KL to the reference."""
    terms = []
    for t, advantage in enumerate(row["advantages"]):
        ratio = (new[t] - row["old"][t]).exp()
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        if advantage < 0:
            objective = torch.maximum(objective, torch.tensor(CLIP_C * advantage))
        gap = row["ref"][t] - new[t]
        terms.append(-objective - ENTROPY_COEFF * entropy[t] + KL_LOSS_COEF * (gap.exp() - gap - 1))
    return torch.stack(terms)


def value_terms(new: torch.Tensor, row: dict[str, Any]) -> torch.Tensor:
    old, target = row["values"], torch.tensor(row["returns"])
    clipped = old + (new - old).clamp(-CLIP_VALUE, CLIP_VALUE)
    return 0.5 * torch.maximum((new - target) ** 2, (clipped - target) ** 2)


def adam(parameters: list[torch.Tensor], lr: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, eps=EPS)


def minimize(optimizer: torch.optim.AdamW, parameters: list[torch.Tensor], loss: torch.Tensor) -> dict[str, float]:
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)
    optimizer.step()
    return {"loss": loss.item(), "grad_norm": norm.item()}


def mean_of(rounds: list[dict[str, float]], role: str) -> dict[str, float]:
    return {f"{role}/{key}": sum(numbers[key] for numbers in rounds) / len(rounds) for key in rounds[0]}


class Solo:
    """PPO in one process."""

    def __init__(self, folders: dict[str, str], head: torch.nn.Linear) -> None:
        self.actor = load_reference(folders["actor"])
        self.reference = copy.deepcopy(self.actor)
        self.critic = load_reference(folders["critic"])
        self.critic.head = head
        self.actor_parameters = list(self.actor.model.parameters())
        self.critic_parameters = [*self.critic.model.model.parameters(), *head.parameters()]
        self.actor_adam = adam(self.actor_parameters, ACTOR_LR)
        self.critic_adam = adam(self.critic_parameters, CRITIC_LR)
        self.kl_coef = KL_COEF

    @torch.no_grad()
    def prepare(self, samples: list[Sample]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for sample, (reward, _) in zip(samples, score(samples), strict=True):
            row: dict[str, Any] = {"sample": sample}
            row["old"] = token_outputs(self.actor, sample)["log_probs"]
            row["ref"] = token_outputs(self.reference, sample)["log_probs"]
            row["values"] = token_outputs(self.critic, sample)["values"]
            row["kl"] = row["old"] - row["ref"]
            rewards = (-self.kl_coef * row["kl"]).tolist()
            rewards[-1] += reward
            row["advantages"], row["returns"] = advantages_of(rewards, row["values"].tolist())
            rows.append(row)
        every = torch.tensor([a for row in rows for a in row["advantages"]], dtype=torch.float64)
        for row in rows:
            row["advantages"] = [float((a - every.mean()) / (every.var() + 1e-8).sqrt()) for a in row["advantages"]]
        error = float(torch.stack([row["kl"].mean() for row in rows]).mean()) / TARGET_KL - 1
        self.kl_coef *= 1 + max(-0.2, min(0.2, error)) * len(rows) / (HORIZON * NUM_PROMPTS)
        return rows

    def step(self, samples: list[Sample], *, critic_epochs: int = EPOCHS, with_actor: bool = True) -> dict[str, float]:
        rows = self.prepare(samples)
        parts = [rows[i : i + MINI] for i in range(0, len(rows), MINI)]
        critic = mean_of([self.update_critic(part) for part in parts * critic_epochs], "critic")
        if not with_actor:
            return critic
        return critic | mean_of([self.update_actor(part) for part in parts * EPOCHS], "actor")

    def update_actor(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        outputs = [token_outputs(self.actor, row["sample"]) for row in rows]
        terms = [policy_terms(o["log_probs"], row, o["entropy"]) for o, row in zip(outputs, rows, strict=True)]
        return minimize(self.actor_adam, self.actor_parameters, torch.cat(terms).mean())

    def update_critic(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        terms = [value_terms(token_outputs(self.critic, row["sample"])["values"], row) for row in rows]
        return minimize(self.critic_adam, self.critic_parameters, torch.cat(terms).mean())


def value_head(folders: dict[str, str]) -> torch.nn.Linear:
    """The head that every layout starts from, read off an engine of one rank."""

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        engine = build_engine(setups(folders, {}, {}, 1)[1])
        head = engine._parts.chunks[-1].bare.output_layer
        return head.weight.detach().clone(), head.bias.detach().clone()

    weight, bias = run_on_ranks(read, 1)[0]
    head = torch.nn.Linear(weight.shape[1], 1)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo_models")
    return {
        "actor": save_tiny_model(folder / "actor", "qwen2", vocab_size=VOCAB, kv_heads=4, layers=8),
        "critic": save_tiny_model(folder / "critic", "llama", vocab_size=VOCAB, kv_heads=8, hidden_size=64),
    }


@pytest.fixture(scope="module")
def solo(folders):
    ppo = Solo(folders, value_head(folders))
    log = [ppo.step(record(seed)) for seed in range(STEPS)]
    return log, {name: tensor.detach() for name, tensor in ppo.actor.model.state_dict().items()}


def check(result: Any, expected: Any) -> None:
    log, weights = result
    expected_log, expected_weights = expected
    for step, (metrics, wanted) in enumerate(zip(log, expected_log, strict=True), start=1):
        for key, value in wanted.items():
            assert metrics[key] == pytest.approx(value, abs=METRIC_TOLERANCE, rel=METRIC_TOLERANCE), (step, key)
    for name, wanted in expected_weights.items():
        torch.testing.assert_close(
            weights[name], wanted, atol=WEIGHT_TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_one_rank_equals_the_single_process_reference(folders, solo):
    result = run_on_ranks(lambda: train(folders, {}, {}, 1), 1)[0]
    check(result, solo)
    assert abs(result[0][-1]["actor/reward_kl_coef"] - KL_COEF) > 1e-4, "the adaptive controller did not act"
    assert 0 < result[0][-1]["actor/clip_fraction"] < 1, "no token was clipped: the test would miss a wrong clip"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_single_process_reference(folders, solo, layout):
    actor_axes, critic_axes, packed = LAYOUTS[layout]
    check(run_on_ranks(lambda: train(folders, actor_axes, critic_axes, 8, packed=packed), 8)[0], solo)


RULE = Rejection(scope="seq_mean", divergence="k1", lower=0.6, upper=1.6)


def test_a_loss_that_looks_at_whole_sequences_and_mini_batches_is_the_same_in_another_layout(folders):
    """Its tokens are selected over a mini-batch, its weights are of sequences, and some sequences are rejected."""
    correction = RolloutCorrection(weighting=Weighting(level="sequence", upper=1.1), rejections=(RULE,))
    options = {
        "policy_loss": KLCov(kl_cov_ratio=0.2, ppo_kl_coef=0.5), "correction": CorrectionStage(correction=correction)
    }  # fmt: skip
    alone_log, alone_weights = run_on_ranks(lambda: train(folders, {}, {}, 1, **options), 1)[0]
    areas = ("actor/", "critic/", "parity/", "rollout_corr/")
    wanted = [{key: value for key, value in metrics.items() if key.startswith(areas)} for metrics in alone_log]
    # Each sequence, too, is spread over ranks.
    actor_axes, critic_axes, packed = LAYOUTS["packed: pp2 vpp2 cp2 dp2, critic tp2 cp4"]
    spread = run_on_ranks(lambda: train(folders, actor_axes, critic_axes, 8, packed=packed, **options), 8)[0]
    check(spread, (wanted, alone_weights))
    for metrics in wanted:
        assert 0 < metrics["rollout_corr/rollout_rs_seq_masked_fraction"] < 1, "nothing or everything was rejected"
        assert 0 < metrics["rollout_corr/rollout_is_ratio_fraction_high"] < 1, "no weight was truncated"
        assert 0.1 < metrics["actor/kl_cov_fraction"] <= 0.2


def test_bypass_mode_leaves_out_the_pass_for_old_log_probs_and_corrects_in_the_update(folders):
    correction = CorrectionStage(correction=RolloutCorrection(rejections=(RULE,)), bypass_mode=True)
    log, _ = run_on_ranks(lambda: train(folders, {}, {}, 1, correction=correction), 1)[0]
    for metrics in log:
        assert "time/log_prob_s" not in metrics
        assert not any(key.startswith("parity/") for key in metrics)
        assert 0 < metrics["actor/rollout_rs_masked_fraction"] < 1
    # Before the first step actor and reference are equal: this is the KL of the engine's recorded log-probs.
    assert log[0]["actor/ref_kl"] > 0.07


def test_the_critic_has_epochs_of_its_own_and_a_head_start(folders):
    result = run_on_ranks(lambda: train(folders, {}, {}, 1, critic_epochs=3, critic_warmup=1), 1)[0]
    ppo = Solo(folders, value_head(folders))
    log = [ppo.step(record(step), critic_epochs=3, with_actor=step >= 1) for step in range(STEPS)]
    check(result, (log, {name: tensor.detach() for name, tensor in ppo.actor.model.state_dict().items()}))
    assert [any(key.startswith("actor/loss") for key in metrics) for metrics in result[0]] == [False, True, True]
