"""From section `rollout.multi_turn` to what answers the model, and its checks before any rank starts."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mrl.config.frozen import thaw
from mrl.config.schema import PPOConfig
from mrl.data.turn_encoder import TurnEncoder
from mrl.rewards.sandbox import check_permitted
from mrl.rollout.conversations import ConversationLimits
from mrl.rollout.environment import FunctionEnvironment

_SECTION = "actor_rollout_ref.rollout.multi_turn"


def load_turn_encoder(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> TurnEncoder | None:
    """What encodes an environment's messages, None where the model answers once.

    Raises:
        ValueError: the environment's file does not exist, this host does not permit its sandbox, or the tokenizer's
            chat template holds no conversations.
    """
    settings = config.actor_rollout_ref.rollout.multi_turn
    if not settings.enable:
        return None
    assert settings.environment.path is not None, "the configuration requires it"
    if not Path(settings.environment.path).expanduser().is_file():
        raise ValueError(
            f"{_SECTION}.environment.path = {settings.environment.path} does not exist; give a Python file"
        )
    if config.reward.sandbox:
        check_permitted()
    return TurnEncoder(tokenizer, thaw(config.data.apply_chat_template_kwargs))


def build_environment(config: PPOConfig) -> FunctionEnvironment:
    """The environment of the run; a worker has loaded its function.

    Raises:
        ValueError: the file does not import or lacks the function.
    """
    settings, reward = config.actor_rollout_ref.rollout.multi_turn.environment, config.reward
    assert settings.path is not None, "the configuration requires it"
    environment = FunctionEnvironment(
        path=settings.path,
        name=settings.name,
        kwargs=thaw(settings.kwargs),
        num_workers=settings.num_workers,
        timeout_s=settings.timeout_s,
        stop_at_failure=settings.on_failure == "raise",
        sandbox=reward.sandbox,
        pass_environment=reward.pass_environment,
    )
    try:
        environment.check_function()
    except ValueError as error:
        environment.close()
        raise ValueError(f"{_SECTION}.environment: {error}") from error
    return environment


def conversation_limits(config: PPOConfig) -> ConversationLimits:
    """When conversations end at the latest."""
    longest = config.data.max_response_length
    turns = config.actor_rollout_ref.rollout.multi_turn.max_assistant_turns
    return ConversationLimits(turns=turns or longest, turn_tokens=config.turn_length, tokens=longest)
