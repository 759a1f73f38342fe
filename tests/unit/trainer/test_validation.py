"""Validation: batches, best of n, data sources."""

from __future__ import annotations

from mrl.trainer.samples import SampleWriter
from mrl.trainer.scoring import Scorer
from mrl.trainer.validation import Validator
from mrl.types import Generation, Prompt, Sample, SamplingParams


class Echo:
    """A rollout whose response is the prompt, with a running number behind it."""

    def __init__(self):
        self.sizes: list[int] = []

    def generate(self, prompts, params):
        self.sizes.append(len(prompts))
        return [
            Sample(
                prompt=prompt,
                generation=Generation(
                    response_ids=[*prompt.token_ids, number % 2],
                    rollout_log_probs=[],
                    finish_reason="stop",
                    weight_version=0,
                ),
            )
            for number, prompt in enumerate(prompts)
        ]


class Digits:
    def batch_decode(self, sequences, *, skip_special_tokens):
        return ["".join(map(str, ids)) for ids in sequences]


def score(samples):
    """The first token, plus a half for the odd ones of each pair."""
    return [(int(s.response_text[0]) + 0.5 * int(s.response_text[-1]), {}) for s in samples]


def validator(*, n=1, batch_size=None, sources=("a",), folder=None):
    prompts = [Prompt(uid=str(i), token_ids=[i], messages=[], data_source=sources[i % len(sources)]) for i in range(4)]
    rollout = Echo()
    return rollout, Validator(
        prompts=prompts,
        batch_size=batch_size,
        rollout=rollout,
        scorer=Scorer(score, Digits(), source_rank=0),
        sampling=SamplingParams(max_new_tokens=2),
        n_samples_per_prompt=n,
        sample_writer=SampleWriter(folder),
        num_logged=0,
    )


def test_means_and_best_of_n_by_hand(tmp_path):
    _, validation = validator(n=2, folder=tmp_path)
    metrics = validation.run(step=5)
    validation.sample_writer.close()
    # Prompts 0..3 score i and i + 0.5.
    assert metrics["val/reward_mean"] == 1.75
    assert metrics["val/reward_best_of_2"] == 2.0
    assert "val/a/reward_mean" not in metrics
    assert len((tmp_path / "5.jsonl").read_text().splitlines()) == 8


def test_data_sources_are_reported_apart():
    _, validation = validator(sources=("a", "b"))
    metrics = validation.run(step=1)
    # Responses alternate: 0, 1.5, 2, 3.5.
    assert metrics["val/a/reward_mean"] == 1.0
    assert metrics["val/b/reward_mean"] == 2.5


def test_the_set_is_generated_in_batches_of_prompts():
    rollout, validation = validator(n=2, batch_size=3)
    validation.run(step=1)
    assert rollout.sizes == [6, 2]


def test_without_prompts_there_is_nothing_to_report():
    _, validation = validator()
    validation.prompts = ()
    assert validation.run(step=1) == {}
