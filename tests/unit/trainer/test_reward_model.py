"""A reward model's scores: how conversations are read, and what becomes of those without a score."""

from __future__ import annotations

import pytest
import torch

from mrl.config.errors import ConfigError
from mrl.config.load import load_config
from mrl.data.embedded import build_embedded_tokenizer
from mrl.interfaces import RewardError
from mrl.trainer.reward_model import ConversationEncoder, RewardModelStage, load_encoder
from mrl.types import Generation, MicroBatchLimit, Prompt, Sample


class CountingModel:
    """Its output after each token is that token's id plus 100 times its position; after a seven it is no number."""

    def compute_values(self, batch, *, limit):
        position = torch.arange(batch.tokens.shape[1])
        outputs = (batch.tokens + 100 * position).float().masked_fill(batch.tokens == 13, torch.nan)
        values = torch.nn.functional.pad(outputs[:, :-1], (1, 0))
        return values.masked_fill(position >= batch.lengths[:, None], 0.0)

    def offload(self):
        pass


def make_sample(response, reward=1.0):
    generation = Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1)
    messages = [{"role": "user", "content": "3"}]
    prompt = Prompt(uid=f"row {response}", token_ids=[1], messages=messages, data_source="s")
    return Sample(prompt=prompt, generation=generation, response_text=response, reward=reward, reward_info={"x": 2.0})


def make_stage(*, max_length=16, pad_token_id=0, on_failure="raise"):
    encoder = ConversationEncoder(
        tokenizer=build_embedded_tokenizer(), max_length=max_length, pad_token_id=pad_token_id
    )
    return RewardModelStage(
        engine=CountingModel(), encoder=encoder, limit=MicroBatchLimit(samples=2), weight=0.5, on_failure=on_failure
    )


def test_the_score_is_read_at_the_conversation_s_last_token():
    # <bos> <user> 3 <assistant> ... <eos>: token 2 stands at position 5 or 6.
    samples = make_stage().score([make_sample("4"), make_sample("45")])
    assert [sample.reward for sample in samples] == [1.0 + 0.5 * 502, 1.0 + 0.5 * 602]
    assert samples[0].reward_info == {"x": 2.0, "reward_model": 502.0}


def test_padding_at_the_end_is_passed_over_as_transformers_does():
    # With end-of-sequence for padding, the token before it is the last one: "4", token 10 at position 4.
    [sample] = make_stage(pad_token_id=2).score([make_sample("4")])
    assert sample.reward_info["reward_model"] == 410.0


def test_a_conversation_too_long_or_without_a_number_scores_zero_and_is_counted(caplog):
    stage = make_stage(max_length=6, on_failure="zero")
    fits, too_long = stage.score([make_sample("4"), make_sample("456")])
    assert fits.reward_info == {"x": 2.0, "reward_model": 502.0, "reward_model/failed": 0.0, "failed": 0.0}
    assert too_long.reward == 1.0
    assert too_long.reward_info["reward_model/failed"] == too_long.reward_info["failed"] == 1.0
    assert "1 of 2 samples could not be scored" in caplog.text
    assert "has 8 of its tokens (at most 6)" in caplog.text


def test_a_failure_may_end_the_run():
    with pytest.raises(RewardError, match=r"sample 'row 456', whose conversation has 8 of its tokens \(at most 6\)"):
        make_stage(max_length=6).score([make_sample("4"), make_sample("456")])
    # Its last token that is no padding is "7", whose output is not a number.
    with pytest.raises(RewardError, match="no finite score for sample 'row 7'"):
        make_stage(pad_token_id=2).score([make_sample("7")])


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    tokenizer = build_embedded_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        load_encoder(tmp_path, tokenizer, max_length=8)


def test_a_template_that_refuses_a_conversation_names_the_row():
    stage = make_stage()
    stage.encoder.tokenizer.chat_template = "{{ raise_exception('no assistant here') }}"
    with pytest.raises(ValueError, match=r"row row 4: the reward model's chat template failed: .*no assistant here"):
        stage.score([make_sample("4")])


ENABLED = ["reward.reward_model.enable=True", "reward.reward_model.model_path=/x"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.reward_model.enable=True"], "enable = True needs model_path"),
        ([*ENABLED, "algorithm.adv_estimator=remax"], r"algorithm\.adv_estimator needs them during it"),
        (
            [*ENABLED, "algorithm.filter_groups.enable=True", "actor_rollout_ref.rollout.n=2"],
            r"algorithm\.filter_groups\.enable needs them during it",
        ),
        ([*ENABLED, "reward.reward_model.weight=0"], "every weight is 0"),
    ],
)
def test_contradictions_are_refused_when_the_configuration_loads(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides)


def test_verl_s_older_spelling_is_mapped():
    settings = load_config(["reward_model.enable=True", "reward_model.model.path=/x"]).reward
    assert (settings.reward_model.enable, settings.reward_model.model_path, dict(settings.parts)) == (True, "/x", {})
