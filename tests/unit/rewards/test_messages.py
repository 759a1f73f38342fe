"""A worker's answers: they come back as they were, and nothing else passes for one."""

import pickle

import pytest

from mrl.rewards.messages import Outcome, Preparing, Ready, decode_answer, encode_answer


@pytest.mark.parametrize(
    "answer",
    [
        Ready(True),
        Ready(False, "no such file"),
        Preparing(),
        [],
        [Outcome(0.5, {"length": 2.0}), Outcome(0.0, {}, "raised KeyError: 'x'")],
    ],
)
def test_answers_come_back_as_they_were(answer):
    decoded = decode_answer(encode_answer(answer))
    assert decoded == answer
    assert type(decoded) is type(answer)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Outcome(1.0, {})),
        b"",
        b"[]",
        b"7",
        b"{}",
        b'{"outcomes": 3}',
        b'{"outcomes": [["high", {}, null]]}',
        b'{"outcomes": [[1.0, [], null]]}',
        b'{"ready": []}',
        b'{"else": []}',
        b'{"preparing": [], "ready": [true, null]}',
    ],
)
def test_what_is_no_answer_is_refused(content):
    with pytest.raises(ValueError, match="a reward worker's answer is"):
        decode_answer(content)
