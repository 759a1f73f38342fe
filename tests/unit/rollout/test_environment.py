"""A user's function as the environment, in real worker processes."""

import pytest

from mrl.rewards.messages import Conversation
from mrl.rollout.environment import FunctionEnvironment

SOURCE = """
import asyncio

def respond(messages, ground_truth, extra_info, suffix=""):
    last = messages[-1]["content"]
    if last == ground_truth:
        return None
    if last == "list":
        return [{"role": "tool", "content": "7"}, {"role": "user", "content": "go on"}]
    if last == "raise":
        raise KeyError("no such tool")
    if last == "number":
        return 5
    if last == "role":
        return [{"content": "who says so?"}]
    if last == "assistant":
        return [{"role": "assistant", "content": "I do"}]
    if last == "object":
        return [{"role": "tool", "content": "x", "data": {1, 2}}]
    if last == "surrogate":
        return "a\\udcff"
    return f"not {last}{suffix}, {extra_info['hint']}"

async def later(messages, ground_truth, extra_info):
    await asyncio.sleep(0.01)
    return messages[-1]["content"] * 2
"""


@pytest.fixture
def environment(tmp_path):
    """Makes environments of the file above, closed at the end."""
    (tmp_path / "environment.py").write_text(SOURCE)
    made = []

    def make(**options):
        made.append(FunctionEnvironment(path=str(tmp_path / "environment.py"), num_workers=2, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def conversation(answer):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return Conversation(messages, "right", {"hint": "try again"})


def test_nothing_text_and_messages(environment):
    outcomes = environment(kwargs={"suffix": "!"}).respond(list(map(conversation, ["right", "wrong", "list"])))
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert outcomes[0].messages is None
    assert outcomes[1].messages == [{"role": "user", "content": "not wrong!, try again"}]
    assert outcomes[2].messages == [{"role": "tool", "content": "7"}, {"role": "user", "content": "go on"}]


def test_a_coroutine_function(environment):
    outcomes = environment(name="later").respond([conversation("ab"), conversation("c")])
    assert [outcome.messages[0]["content"] for outcome in outcomes] == ["abab", "cc"]


def test_what_a_function_must_not_return_is_its_conversations_error_alone(environment):
    answers = ["raise", "wrong", "number", "role", "assistant", "object", "surrogate"]
    outcomes = environment().respond(list(map(conversation, answers)))
    for outcome, error in zip(
        outcomes,
        (
            "raised KeyError: 'no such tool'",
            None,
            "returned what it must not: 5 is no list",
            "is no message with a 'role' and a 'content'",
            "speaks for the model",
            "has values other than text",
            "surrogates not allowed",
        ),
        strict=True,
    ):
        assert (outcome.error is None) == (error is None)
        assert (outcome.messages is None) == (error is not None)
        assert error is None or error in str(outcome.error)


def test_a_failure_may_spare_the_others(environment):
    outcomes = environment(stop_at_failure=True).respond([conversation("raise")] * 9)
    assert any("no such tool" in str(outcome.error) for outcome in outcomes)
    assert all(outcome.error for outcome in outcomes)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def other(): pass",
            r"cannot load the environment: .* has no function 'respond'; its functions are \['other'\]",
        ),
        ("1 / 0", "environment file .* does not import: raised ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, source, message):
    (tmp_path / "environment.py").write_text(source)
    environment = FunctionEnvironment(path=str(tmp_path / "environment.py"))
    try:
        with pytest.raises(ValueError, match=message):
            environment.check_function()
    finally:
        environment.close()
