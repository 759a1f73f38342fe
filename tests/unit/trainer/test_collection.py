"""What a step generates: groups in order, groups without a spread replaced, greedy baselines, resumed exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mrl.data.loader import PromptLoader
from mrl.observability.timers import PhaseTimer
from mrl.rewards.overlong import OverlongPenalty
from mrl.trainer.collection import SampleCollector, merge_rollouts
from mrl.trainer.group_filter import GroupFilter, read_metric
from mrl.trainer.scoring import Scorer
from mrl.types import Generation, Prompt, Sample, SamplingParams

SAMPLED = SamplingParams(max_new_tokens=4)
GREEDY = replace(SAMPLED, temperature=0.0)


class Numbered:
    """A rollout of two tokens: the prompt's number, and how often the prompt was sampled (greedily: 9)."""

    def __init__(self):
        self.metrics = {}
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append([prompt.token_ids[0] for prompt in prompts])
        counts = dict.fromkeys((prompt.uid for prompt in prompts), 0)
        samples = []
        for prompt in prompts:
            response = [prompt.token_ids[0], counts[prompt.uid] if params.temperature else 9]
            counts[prompt.uid] += 1
            samples.append(Sample(prompt=prompt, generation=generation(response)))
        tokens = 2.0 * len(prompts)
        self.metrics = {"rollout/tokens": tokens, "rollout/engine_s": 1.0, "rollout/tokens_per_s": tokens / 2.0}
        return samples


class Digits:
    def batch_decode(self, sequences, *, skip_special_tokens):
        return ["".join(map(str, ids)) for ids in sequences]


def generation(response):
    return Generation(
        response_ids=response, rollout_log_probs=[0.0] * len(response), finish_reason="stop", weight_version=0
    )


def multiples_of_three(samples):
    """Responses to prompts 0, 3, 6, ... differ: 0 for the first, 1 for the second; all others score the prompt."""
    scores = []
    for sample in samples:
        number, turn = sample.generation.response_ids
        scores.append((float(turn) if number % 3 == 0 else float(number), {"number": float(number)}))
    return scores


def make_collector(*, num_prompts=10, gen_batch_size=2, n_prompts=2, score=multiples_of_three, **settings):
    prompts = [
        Prompt(uid=f"p{number}", token_ids=[number], messages=[], data_source="s") for number in range(num_prompts)
    ]
    return SampleCollector(
        prompts=PromptLoader(prompts, batch_size=gen_batch_size, shuffle=False, seed=0),
        rollout=Numbered(),
        scorer=Scorer(score, Digits(), source_rank=0),
        sampling=SAMPLED,
        n_samples_per_prompt=2,
        n_prompts=n_prompts,
        **settings,
    )


def collect(collector):
    samples, metrics = collector.collect(PhaseTimer())
    return [tuple(sample.generation.response_ids) for sample in samples], metrics


def filtering(limit=0, metric="reward"):
    return GroupFilter(metric=metric, max_num_gen_batches=limit)


def test_every_prompt_is_kept_without_a_filter():
    collector = make_collector()
    responses, metrics = collect(collector)
    assert responses == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert metrics["rollout/zero_variance_fraction"] == 0.5
    assert "rollout/gen_batches" not in metrics
    assert collect(collector)[0] == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_groups_without_a_spread_are_replaced_by_further_prompts():
    collector = make_collector(group_filter=filtering())
    responses, metrics = collect(collector)
    assert collector.rollout.calls == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert responses == [(0, 0), (0, 1), (3, 0), (3, 1)]
    counts = {key: value for key, value in metrics.items() if "group" in key or "batches" in key}
    assert counts == {
        "rollout/gen_batches": 2.0,
        "rollout/groups_generated": 4.0,
        "rollout/groups_dropped": 2.0,
        "rollout/groups_surplus": 0.0,
    }
    # 0 and 1, twice 1, twice 2, 0 and 1, over eight.
    assert metrics["reward/generated_mean"] == 1.0


def test_groups_beyond_a_steps_size_are_dropped_and_the_next_step_draws_new_prompts():
    collector = make_collector(gen_batch_size=5, n_prompts=1, group_filter=filtering())
    responses, metrics = collect(collector)
    assert responses == [(0, 0), (0, 1)]
    assert metrics["rollout/groups_surplus"] == 1.0, "prompt 3"
    assert collect(collector)[0] == [(6, 0), (6, 1)]


def test_a_step_that_crosses_epochs_keeps_the_groups_of_a_prompt_apart():
    collector = make_collector(num_prompts=2, group_filter=filtering())
    assert collect(collector)[0] == [(0, 0), (0, 1), (0, 0), (0, 1)]


def test_a_resumed_run_draws_the_same_prompts():
    unbroken = make_collector(group_filter=filtering())
    steps = [collect(unbroken)[0] for _ in range(4)]
    assert len(set(itertools.chain(*steps))) > 4
    first = make_collector(group_filter=filtering())
    assert [collect(first)[0] for _ in range(2)] == steps[:2]
    resumed = make_collector(group_filter=filtering())
    resumed.prompts.load_state_dict(first.prompts.state_dict())
    assert [collect(resumed)[0] for _ in range(2)] == steps[2:]


def test_too_many_generation_batches_end_the_run_with_what_was_found():
    def hopeless(samples):
        return [(float(sample.generation.response_ids[0] == 1), {}) for sample in samples]

    collector = make_collector(score=hopeless, group_filter=filtering(limit=3))
    with pytest.raises(ValueError, match=r"3 generation batches .* filled 0 of the 2 .* 6 of 6 .*\(5 at 0, 1 at 1\)"):
        collect(collector)
    assert len(collector.rollout.calls) == 3


def test_a_response_that_could_not_be_scored_makes_no_difference():
    prompt = Prompt(uid="p", token_ids=[1], messages=[], data_source="s")

    def group(*outcomes):
        whole = Sample(prompt=prompt, generation=generation([1]))
        return [
            replace(whole, reward=0.0, reward_info={"failed": 1.0})
            if outcome is None
            else replace(whole, reward=outcome, reward_info={"failed": 0.0, "pass_rate": outcome})
            for outcome in outcomes
        ]

    alike, different, lost = group(1.0, None, 1.0), group(1.0, None, 0.5), group(None, None)
    for metric in ("reward", "pass_rate"):
        assert filtering(metric=metric).split([alike, different, lost]) == ([different], [alike, lost])
    with pytest.raises(ValueError, match=r"the same pass_rate \(none of them could be scored\)"):
        filtering(limit=1, metric="pass_rate").check_limit([lost], kept=0, needed=2, gen_batches=1)


def test_the_last_generation_batch_that_is_allowed_may_fill_the_step():
    assert collect(make_collector(group_filter=filtering(limit=2)))[0] == [(0, 0), (0, 1), (3, 0), (3, 1)]


def test_metrics_by_their_names():
    sample = Sample(
        prompt=Prompt(uid="p", token_ids=[1], messages=[], data_source="s"),
        generation=generation([1]),
        reward=0.25,
        reward_info={"format": 0.5},
    )
    for name in ("reward", "seq_reward", "seq_final_reward", "acc", "score"):
        assert read_metric(sample, name) == 0.25
    assert read_metric(sample, "format") == 0.5
    shaped = replace(sample, reward_info={"score": 1.0})
    assert (read_metric(shaped, "acc"), read_metric(shaped, "reward")) == (1.0, 0.25)
    with pytest.raises(ValueError, match=r"metric = style, but .* p has no such part; there are format, reward, score"):
        read_metric(sample, "style")


def test_the_penalty_on_length_is_part_of_the_reward_but_not_of_the_score():
    prompt = Prompt(uid="p", token_ids=[1], messages=[], data_source="s")
    pair = [Sample(prompt=prompt, generation=generation([7] * length), reward=0.5) for length in (1, 3)]
    group = OverlongPenalty(max_resp_len=3, buffer_len=2, penalty_factor=1.0, log=False).apply(pair)
    assert filtering(metric="reward").split([group]) == ([group], [])
    assert filtering(metric="acc").split([group]) == ([], [group])


def test_collected_samples_carry_the_penalty():
    # Two tokens of three, with a buffer of two.
    penalty = OverlongPenalty(max_resp_len=3, buffer_len=2, penalty_factor=1.0, log=False)
    samples, _ = make_collector(overlong_penalty=penalty).collect(PhaseTimer())
    assert [sample.reward for sample in samples] == [-0.5, 0.5, 0.5, 0.5]


def test_a_greedy_response_to_each_prompt_that_is_kept_is_its_baseline():
    collector = make_collector(group_filter=filtering(), baseline_sampling=GREEDY)
    samples, metrics = collector.collect(PhaseTimer())
    assert collector.rollout.calls == [[0, 0, 1, 1], [2, 2, 3, 3], [0, 3]]
    assert [sample.baseline for sample in samples] == [9.0] * 4
    assert [sample.reward for sample in samples] == [0.0, 1.0, 0.0, 1.0]
    assert metrics["rollout/tokens"] == 8.0 + 8.0 + 4.0


def test_calls_to_the_engines_add_up():
    rounds = [
        {"rollout/tokens": 10.0, "rollout/engine_s": 1.0, "rollout/tokens_per_s": 5.0},
        {"rollout/tokens": 30.0, "rollout/engine_s": 2.0, "rollout/tokens_per_s": 10.0},
    ]
    assert merge_rollouts(rounds[:1]) == rounds[0]
    # 2 s and 3 s.
    assert merge_rollouts(rounds) == {
        "rollout/tokens": 40.0,
        "rollout/engine_s": 3.0,
        "rollout/tokens_per_s": 8.0,
    }
