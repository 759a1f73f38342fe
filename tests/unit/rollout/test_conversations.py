"""Conversations over an engine and an environment that follow a script."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mrl.interfaces import EnvironmentFailedError
from mrl.launch.fork import RankFailure, run_ranks
from mrl.launch.rendezvous import init_process_group
from mrl.rewards.messages import Outcome
from mrl.rewards.pool import SKIPPED
from mrl.rollout.batch import build_batch
from mrl.rollout.conversations import ConversationLimits, ConversationRollout
from mrl.types import Generation, Prompt, Sample, SamplingParams

EOS = 9
PARAMS = SamplingParams(max_new_tokens=20)


class ScriptedRollout:
    """Answers with the prompt's length and the end of sequence; remembers what it was asked."""

    def __init__(self, *, length=2, finish_reason="stop"):
        self.length = length
        self.finish_reason = finish_reason
        self.asked = []
        self.metrics = {}
        self.weight_version = 3
        self.closed = False

    def generate(self, prompts, params):
        self.asked.append(([list(prompt.token_ids) for prompt in prompts], params.max_new_tokens))
        self.metrics = {"rollout/tokens": float(self.length * len(prompts)), "rollout/engine_s": 0.5}
        self.metrics |= {"rollout/engine_restarts": 1.0, "rollout/tokens_per_s": 7.0}
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt):
        response = [len(prompt.token_ids)] * (self.length - 1) + [EOS]
        generation = Generation(
            response_ids=response,
            rollout_log_probs=[-float(len(prompt.token_ids))] * self.length,
            finish_reason=self.finish_reason,
            weight_version=3,
            routed_experts=torch.zeros(len(prompt.token_ids) + self.length - 1, 4),
        )
        return Sample(prompt=prompt, generation=generation)

    def close(self):
        self.closed = True


class ScriptedEnvironment:
    """Replies to each conversation what its prompt's ground truth says, turn by turn."""

    def __init__(self):
        self.seen = []
        self.closed = False

    def respond(self, conversations):
        self.seen.append([[message["content"] for message in each.messages] for each in conversations])
        return [self._reply(each) for each in conversations]

    def _reply(self, conversation):
        turn = sum(message["role"] == "assistant" for message in conversation.messages) - 1
        reply = conversation.ground_truth[turn]
        if isinstance(reply, Exception):
            raise reply
        if reply == "broken":
            return Outcome(0.0, {}, "raised it")
        if reply == "skipped":
            return SKIPPED
        return Outcome(0.0, {}, messages=reply and [{"role": "user", "content": reply}])

    def close(self):
        self.closed = True


class Letters:
    """A token for each letter of a message."""

    def encode(self, messages, *, last_token):
        assert last_token == EOS
        if messages[0]["content"] == "unspeakable":
            raise TypeError("no such letters")
        return [100 + len(message["content"]) for message in messages for _ in message["content"]]

    def decode(self, answer, *, has_ended):
        return ",".join(map(str, answer[:-1] if has_ended else answer))


def prompt(*script, length=3):
    messages = [{"role": "user", "content": "q"}]
    return Prompt(uid="0", token_ids=[1] * length, messages=messages, data_source="x", ground_truth=script)


def converse(*prompts, rollout=None, turns=9, tokens=20, turn_tokens=5, on_failure="end"):
    rollout = rollout or ScriptedRollout()
    environment = ScriptedEnvironment()
    limits = ConversationLimits(turns=turns, turn_tokens=turn_tokens, tokens=tokens)
    conversations = ConversationRollout(rollout, environment, Letters(), limits, on_failure=on_failure)
    return conversations, conversations.generate(list(prompts), PARAMS), rollout, environment


def test_two_conversations_worked_by_hand():
    conversations, (short, long), rollout, environment = converse(prompt(None), prompt("abc", None))
    # The second has 3 + 2 + 3 tokens before its second answer.
    assert rollout.asked == [([[1] * 3, [1] * 3], 5), ([[1, 1, 1, 3, EOS, 103, 103, 103]], 5)]
    assert environment.seen == [[["q", "3"]] * 2, [["q", "3", "abc", "8"]]]
    assert list(short.generation.response_ids) == [3, EOS]
    assert short.generation.response_mask is None
    assert short.turns == [{"role": "assistant", "content": "3"}]
    generation = long.generation
    assert list(generation.response_ids) == [3, EOS, 103, 103, 103, 8, EOS]
    assert list(generation.rollout_log_probs) == [-3, -3, 0, 0, 0, -8, -8]
    assert list(generation.response_mask) == [1, 1, 0, 0, 0, 1, 1]
    assert [turn["role"] for turn in long.turns] == ["assistant", "user", "assistant"]
    # The last call saw all tokens but the last.
    assert len(generation.routed_experts) == 3 + 7 - 1
    assert long.prompt.token_ids == [1] * 3
    metrics = dict(conversations.metrics)
    assert metrics.pop("rollout/tokens_per_s") > 0
    assert 0 <= metrics.pop("rollout/environment_s") < 5
    assert metrics == {
        "rollout/tokens": 6,
        "rollout/engine_s": 1.0,
        "rollout/engine_restarts": 2,
        "rollout/environment_failed": 0,
        "rollout/environment_no_room": 0,
    }
    batch = build_batch([short, long], pad_token_id=0)
    assert batch.loss_mask[1].tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2


def test_conversations_end_where_a_limit_says():
    _, [two_turns], rollout, environment = converse(prompt("a", "b", "c"), turns=2)
    assert len(rollout.asked) == 2
    assert len(environment.seen) == 1, "nobody answers the last turn"
    assert list(two_turns.generation.response_ids) == [3, EOS, 101, 6, EOS]
    # 2 + 3 + 2 tokens, and 3 more leave 5 of 15 and less of 14; with 12 nobody is asked any more.
    for tokens, length, asked, lost in ((15, 12, 2, 0), (14, 7, 2, 1), (12, 7, 1, 0)):
        conversations, [sample], _, environment = converse(prompt("abc", "abc", "abc"), tokens=tokens)
        assert len(sample.generation.response_ids) == length
        assert [turn["role"] for turn in sample.turns] == ["assistant", "user", "assistant", "user", "assistant"][
            : 2 * (length // 5) + 1
        ]
        assert len(environment.seen) == asked
        assert conversations.metrics["rollout/environment_no_room"] == lost
    # Not encoded to find out.
    conversations, [sample], _, _ = converse(prompt("a" * 1000))
    assert len(sample.generation.response_ids) == 2
    assert conversations.metrics["rollout/environment_no_room"] == 1
    _, [cut], _, environment = converse(prompt("abc"), rollout=ScriptedRollout(finish_reason="length"))
    assert environment.seen == []
    assert len(cut.generation.response_ids) == 2


def test_a_failure_of_the_environment_ends_the_conversation_and_is_counted(caplog):
    conversations, samples, _, _ = converse(prompt("broken"), prompt("a", None), prompt("unspeakable"))
    assert conversations.metrics["rollout/environment_failed"] == 2
    assert [len(sample.generation.response_ids) for sample in samples] == [2, 5, 2]
    assert "failed in 2 of 3 conversations; in the first it raised it" in caplog.text


def test_failures_that_end_the_run_name_the_first_that_is_one():
    unspeakable = "it returned what cannot be encoded: TypeError: no such letters"
    with pytest.raises(EnvironmentFailedError, match=f"in 2 of 3 conversations; in the first {unspeakable}"):
        converse(prompt("skipped"), prompt("unspeakable"), prompt("a", None), on_failure="raise")
    with pytest.raises(EnvironmentFailedError, match="in 16 of 16 conversations"):
        converse(*[prompt("broken")] * 16)


def test_closing_closes_both():
    conversations, _, rollout, environment = converse(prompt(None))
    conversations.close()
    assert rollout.closed
    assert environment.closed


def on_two_ranks(scenario):
    def main(env):
        init_process_group(env, backend="gloo", timeout=timedelta(seconds=60))
        try:
            environment = ScriptedEnvironment() if env.rank == 0 else None
            limits = ConversationLimits(turns=3, turn_tokens=5, tokens=20)
            return scenario(ConversationRollout(ScriptedRollout(), environment, Letters(), limits))
        finally:
            dist.destroy_process_group()

    return run_ranks(main, 2, timeout_s=60)


def test_every_rank_gets_what_the_environment_of_one_says():
    def scenario(conversations):
        [sample] = conversations.generate([prompt("ab", None)], PARAMS)
        return list(sample.generation.response_ids), sample.turns

    first, second = on_two_ranks(scenario)
    assert first == second
    assert first[0] == [3, EOS, 102, 102, 7, EOS]


def test_a_failure_that_ends_the_run_is_raised_on_every_rank():
    def scenario(conversations):
        try:
            conversations.generate([prompt(EnvironmentFailedError("gone"))], PARAMS)
        except EnvironmentFailedError as error:
            return str(error)
        return "nothing"

    try:
        assert on_two_ranks(scenario) == ["gone", "gone"]
    except RankFailure as failure:
        pytest.fail(str(failure))
