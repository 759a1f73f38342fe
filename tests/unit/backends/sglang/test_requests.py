"""SGLang's answers in this package's types."""

import base64

import numpy as np
import pytest
import torch

from mrl.backends.sglang.requests import generation_of, pack_experts
from mrl.interfaces import EngineError
from mrl.types import SamplingParams

PARAMS = SamplingParams(max_new_tokens=2)
WITH_EXPERTS = SamplingParams(max_new_tokens=2, return_routed_experts=True)


def output(*, experts=None, **meta):
    """An answer of two tokens to a prompt of three."""
    encoded = {} if experts is None else {"routed_experts": base64.b64encode(np.int32(experts).tobytes()).decode()}
    answer = {
        "output_ids": [7, 8],
        "meta_info": {
            "output_token_logprobs": [(-0.5, 7, None), (-1.5, 8, None)],
            "finish_reason": {"type": "length"},
            "weight_version": "4",
            "prompt_tokens": 3,
            **encoded,
            **meta,
        },
    }
    return pack_experts(answer)


def test_an_answer_of_a_hand_worked_case():
    generation = generation_of(output(experts=range(4 * 6)), PARAMS)
    assert (list(generation.response_ids), list(generation.rollout_log_probs)) == ([7, 8], [-0.5, -1.5])
    assert (generation.finish_reason, generation.weight_version) == ("length", 4)
    assert generation.routed_experts is None


def test_experts_have_a_row_for_every_token_but_the_last():
    experts = generation_of(output(experts=range(4 * 6)), WITH_EXPERTS).routed_experts
    assert experts is not None
    assert experts.tolist() == [list(range(first, first + 6)) for first in (0, 6, 12, 18)]
    assert experts.dtype == torch.uint8
    many = generation_of(output(experts=range(250, 250 + 4 * 6)), WITH_EXPERTS).routed_experts
    assert many is not None
    assert many.dtype == torch.int16
    assert int(many[-1, -1]) == 273


@pytest.mark.parametrize(
    ("answer", "params", "message"),
    [
        (output(), WITH_EXPERTS, "did not report the experts .* enable_return_routed_experts=True"),
        (output(experts=range(25)), WITH_EXPERTS, "25 experts for 4 tokens"),
        (output(experts=[]), WITH_EXPERTS, "0 experts for 4 tokens"),
        (output(), SamplingParams(max_new_tokens=3), "cut a response at 2 of 3 tokens"),
        (output(output_token_logprobs=[(-0.5, 7, None)]), PARAMS, "1 log-probs for 2 tokens"),
        (output(output_token_logprobs=[(-0.5, 7, None), (float("nan"), 8, None)]), PARAMS, "not finite"),
        (output(output_token_logprobs=[(-0.5, 7, None), (-3.4e38, 8, None)]), PARAMS, "not finite"),
        (output(finish_reason={"type": "stop", "matched": "NaN happened"}), PARAMS, "for 'NaN happened'"),
    ],
)
def test_answers_that_cannot_be_trained_on_are_errors(answer, params, message):
    with pytest.raises(EngineError, match=message):
        generation_of(answer, params)
