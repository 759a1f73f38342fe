import pytest
import torch

from mrl.rollout.batch import build_batch, decode_responses
from mrl.types import Generation, Prompt, Sample


def sample(prompt: list[int], response: list[int], log_probs: list[float] | None = None) -> Sample:
    values = log_probs if log_probs is not None else [-0.5 * token for token in response]
    return Sample(
        prompt=Prompt(uid="file:0", token_ids=prompt, messages=[], data_source="task"),
        generation=Generation(response_ids=response, rollout_log_probs=values, finish_reason="stop", weight_version=3),
    )


def test_batch_of_a_hand_worked_case():
    batch = build_batch([sample([5, 6, 7], [8, 2]), sample([9], [4])], pad_token_id=1)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 2], [9, 4, 1, 1, 1]]
    assert batch.lengths.tolist() == [5, 2]
    assert batch.loss_mask.tolist() == [[False, False, False, True, True], [False, True, False, False, False]]
    assert batch.rollout_log_probs.tolist() == [[0, 0, 0, -4.0, -1.0], [0, -2.0, 0, 0, 0]]
    assert batch.tokens.dtype == torch.int64
    assert batch.rollout_log_probs.dtype == torch.float32


def test_other_samples_change_nothing_but_the_padding():
    alone = build_batch([sample([5, 6], [7, 8])], pad_token_id=0)
    beside = build_batch([sample([5, 6], [7, 8]), sample([1] * 9, [3] * 9)], pad_token_id=0)
    assert torch.equal(alone.tokens[0], beside.tokens[0, :4])
    assert torch.equal(alone.rollout_log_probs[0], beside.rollout_log_probs[0, :4])
    assert not beside.loss_mask[0, 4:].any()


def test_experts_go_with_their_samples_uncopied():
    samples = [sample([5, 6], [7, 8]), sample([9], [4]), sample([3], [1, 2])]
    for number, each in enumerate(samples):
        each.generation.routed_experts = torch.full((3, 4), number, dtype=torch.uint8)
    batch = build_batch(samples, pad_token_id=0)
    for selected, numbers in (
        (batch.select([2, 0]), [2, 0]),
        (batch.select(torch.tensor([1])), [1]),
        (batch.select(slice(1, 3)).trim(), [1, 2]),
        (batch.map_tensors(torch.clone), [0, 1, 2]),
    ):
        experts = selected.routed_experts
        assert [int(each[0, 0]) for each in experts] == numbers
        assert [each.data_ptr() for each in experts] == [batch.routed_experts[each].data_ptr() for each in numbers]
    samples[1].generation.routed_experts = None
    with pytest.raises(ValueError, match="only 2 of 3 samples come with their routed experts"):
        build_batch(samples, pad_token_id=0)
    assert build_batch(samples[1:2], pad_token_id=0).routed_experts is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (sample([], [1]), "0 prompt and 1 response"),
        (sample([1], []), "1 prompt and 0 response"),
        (sample([1], [2, 3], [-1.0]), "1 log-probs for 2 tokens"),
    ],
)
def test_a_broken_sample_is_refused_by_name(broken, message):
    with pytest.raises(ValueError, match=f"file:0.*{message}"):
        build_batch([broken], pad_token_id=0)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        build_batch([], pad_token_id=0)


def test_responses_are_decoded_without_special_tokens():
    class Letters:
        def batch_decode(self, sequences, *, skip_special_tokens):
            assert skip_special_tokens
            return ["".join(chr(96 + token) for token in ids if token != 2) for ids in sequences]

    samples = [sample([9], [1, 3, 2]), sample([9], [4])]
    assert decode_responses(samples, Letters()) == ["ac", "d"]
