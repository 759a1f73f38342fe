"""The stage that turns scored samples into advantages."""

from __future__ import annotations

import pytest
import torch

from mrl.algorithms.estimators.remax import ReMax
from mrl.algorithms.estimators.rloo import RLOO
from mrl.algorithms.kl import FixedKLController
from mrl.rollout.batch import build_batch
from mrl.trainer.advantages import AdvantageStage, group_numbers
from mrl.types import Generation, Prompt, Sample


def make_sample(uid, reward, *, length=2, baseline=None):
    prompt = Prompt(uid=uid, token_ids=[1, 2], messages=[], data_source="s")
    generation = Generation(
        response_ids=[3] * length, rollout_log_probs=[0.0] * length, finish_reason="stop", weight_version=0
    )
    return Sample(prompt=prompt, generation=generation, reward=reward, baseline=baseline)


def compute(stage, samples):
    batch = build_batch(samples, pad_token_id=0)
    flat = torch.zeros(batch.tokens.shape)
    return stage.compute(batch.with_fields(old_log_probs=flat - 1.0, ref_log_probs=flat - 1.5), samples)


def test_a_prompt_that_comes_twice_makes_two_groups():
    samples = [make_sample(uid, reward) for uid, reward in [("a", 0.0), ("a", 2.0), ("b", 1.0), ("b", 1.0)] * 2]
    assert group_numbers(samples, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(AssertionError, match="groups are mixed up"):
        group_numbers(samples[1:], 2)


def test_rewards_are_compared_after_their_kl_penalty():
    stage = AdvantageStage(
        estimator=RLOO(), kl_penalty="kl", kl_controller=FixedKLController(0.1), n_samples_per_prompt=2
    )
    # 0.5 a token, times 0.1: 0.05 of one token and 0.15 of three.
    batch, metrics = compute(stage, [make_sample("a", 1.0, length=1), make_sample("a", 3.0, length=3)])
    expected = torch.tensor([[-1.9, 0.0, 0.0], [1.9, 1.9, 1.9]])
    torch.testing.assert_close(batch.advantages[:, 2:], expected, rtol=0, atol=1e-6)
    assert "critic/explained_variance" not in metrics


def test_greedy_baselines_reach_the_estimator():
    stage = AdvantageStage(estimator=ReMax(), kl_penalty="kl", kl_controller=None, n_samples_per_prompt=1)
    batch, _ = compute(stage, [make_sample("a", 1.0, baseline=0.25), make_sample("b", 0.0, baseline=1.0)])
    assert batch.advantages[:, 2:].tolist() == [[0.75, 0.75], [-1.0, -1.0]]
