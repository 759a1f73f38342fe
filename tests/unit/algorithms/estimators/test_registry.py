"""What holds for every advantage estimator: its invariances, and the numbers that verl's functions give."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from estimator_cases import random_inputs
from torch.nn.functional import pad

from mrl.algorithms.estimators import ESTIMATORS, AdvantageInputs, EstimatorSettings, build_estimator

PUBLISHED = json.loads((Path(__file__).parents[3] / "data/verl_0_9_1/advantages.json").read_text())
CASES = {f"{case['adv_estimator']}-{case['settings']}": case for case in PUBLISHED["cases"]}


def estimate(name: str, inputs: AdvantageInputs):
    return build_estimator(name, EstimatorSettings(gamma=0.97, lam=0.9))(inputs)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'grop' is unknown; known: gae, gpg, grpo"):
        build_estimator("grop", EstimatorSettings())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_padding_and_what_lies_outside_the_mask_change_nothing(name):
    inputs = random_inputs()
    junk = torch.where(inputs.loss_mask, inputs.rewards, torch.nan)
    padded = replace(
        inputs,
        rewards=pad(junk, (2, 3), value=50.0),
        loss_mask=pad(inputs.loss_mask, (2, 3)),
        values=pad(inputs.values, (2, 3), value=-7.0),
    )
    for whole, wide in zip(estimate(name, inputs), estimate(name, padded), strict=True):
        assert whole.dtype == torch.float32
        assert torch.equal(wide[:, 2:-3], whole)
        assert torch.equal(wide[:, 2:-3] * inputs.loss_mask, whole), "only trained tokens have advantages"
        assert wide[:, :2].count_nonzero() == wide[:, -3:].count_nonzero() == 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_samples_and_the_groups_numbers_do_not_matter(name):
    inputs = random_inputs()
    order = torch.randperm(len(inputs.groups), generator=torch.Generator().manual_seed(1))
    other = AdvantageInputs(
        rewards=inputs.rewards[order],
        loss_mask=inputs.loss_mask[order],
        groups=1000 - 7 * inputs.groups[order],
        values=inputs.values[order],
        baselines=inputs.baselines[order],
    )
    for whole, shuffled in zip(estimate(name, inputs), estimate(name, other), strict=True):
        # Sums over samples run in another order, in float64.
        torch.testing.assert_close(shuffled, whole[order], rtol=1e-6, atol=1e-6)


def test_every_estimator_has_published_numbers():
    assert {case["adv_estimator"] for case in CASES.values()} == set(ESTIMATORS)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_verls_numbers(case):
    recorded, inputs = CASES[case], PUBLISHED["inputs"]
    estimator = build_estimator(recorded["adv_estimator"], EstimatorSettings(**recorded["settings"]))
    found = estimator(
        AdvantageInputs(
            rewards=torch.tensor(inputs["rewards"]),
            loss_mask=torch.tensor(inputs["loss_mask"]),
            groups=torch.tensor(inputs["groups"]),
            values=torch.tensor(inputs["values"]),
            baselines=torch.tensor(inputs["baselines"]),
        )
    )
    for name in ("advantages", "returns"):
        # Theirs are sums in float32; the record has seven decimals.
        torch.testing.assert_close(getattr(found, name), torch.tensor(recorded[name]), rtol=1e-5, atol=1e-5)
