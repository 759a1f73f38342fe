"""Settings of a role's model: sections `actor_rollout_ref.model` and `critic.model`."""

from __future__ import annotations

from dataclasses import dataclass

from mrl.config.section import Section

DEFAULT_MODEL_PATH = "~/models/deepseek-llm-7b-chat"


@dataclass(kw_only=True, frozen=True)
class CriticModelConfig(Section):
    """The critic's initial weights."""

    path: str = DEFAULT_MODEL_PATH
    """Hugging Face folder or hub name; the actor's unless set. `embedded:critic` is the embedded one."""
    use_remove_padding: bool = True
    """Run a micro-batch's samples end to end instead of padded to the longest (`megatron.use_remove_padding`)."""


@dataclass(kw_only=True, frozen=True)
class ModelConfig(Section):
    """The actor's initial weights, which are also the reference's."""

    path: str = DEFAULT_MODEL_PATH
    """Hugging Face folder or hub name. `embedded:actor` and `embedded:moe_actor` are the embedded ones."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer; null is the model's."""
    use_remove_padding: bool = True
    """Run a micro-batch's samples end to end instead of padded to the longest (`megatron.use_remove_padding`)."""
