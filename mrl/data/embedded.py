"""The embedded task: a counting exercise, its tokenizer and two tiny models, all made by code.

The task is small enough that PPO solves it from random weights in a few dozen steps on a CPU, and has everything a
real one has: parquet files in verl's row format, a chat template, an end-of-sequence token that has to be learned, a
rule-based reward with partial credit, an actor and a critic of different families and sizes, and another actor with
experts.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import GenerationConfig, LlamaConfig, Qwen2Config, Qwen2Tokenizer, Qwen3MoeConfig

from mrl.data.rows import write_rows
from mrl.rewards.embedded import DATA_SOURCE

PREFIX = "embedded:"
NUM_TRAIN_ROWS = 2048

_REVISION = "3"
"""Part of the folder's name; raise it with every change of what is written, so that no stale folder is reused."""
_LAST_DIGITS = range(3, 8)
_RUN_LENGTHS = range(1, 4)
_SEED = 20250101
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
_ROLE_TOKENS = ("<system>", "<user>", "<assistant>")
_ALPHABET = "0123456789"
_VOCAB_SIZE = len(_SPECIAL_TOKENS) + len(_ROLE_TOKENS) + len(_ALPHABET)
_MAX_POSITIONS = 256

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
"""The response continues the last message: there is no header between the two."""


@dataclass(kw_only=True, frozen=True)
class EmbeddedPaths:
    """Where the embedded task lies on disk."""

    actor_model: Path
    moe_actor_model: Path
    critic_model: Path
    train_file: Path
    val_file: Path


_FIELDS = {
    "actor": "actor_model",
    "moe_actor": "moe_actor_model",
    "critic": "critic_model",
    "train": "train_file",
    "val": "val_file",
}
"""Of `EmbeddedPaths`, by the name after "embedded:"."""


def resolve_embedded(path: str, folder: Path) -> str:
    """`path` itself, or, for "embedded:NAME", the file or folder of that name made under `folder`.

    Raises:
        ValueError: the name after "embedded:" is unknown.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in _FIELDS:
        raise ValueError(f"unknown embedded path {path!r}; known: {', '.join(PREFIX + known for known in _FIELDS)}")
    return str(getattr(materialise(folder), _FIELDS[name]))


def materialise(folder: Path) -> EmbeddedPaths:
    """Write the embedded task under `folder` unless it is there already.

    Any number of processes may call it at once: each writes beside the target and one rename wins.
    """
    target = Path(folder).expanduser() / f"embedded-{_REVISION}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".embedded-", dir=target.parent))
        try:
            _write_in_child(_paths(scratch))
            _publish(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return _paths(target)


def _paths(root: Path) -> EmbeddedPaths:
    return EmbeddedPaths(
        actor_model=root / "actor",
        moe_actor_model=root / "moe_actor",
        critic_model=root / "critic",
        train_file=root / "train.parquet",
        val_file=root / "val.parquet",
    )


def _publish(scratch: Path, target: Path) -> None:
    try:
        os.rename(scratch, target)
    except OSError:
        if not target.is_dir():
            raise


def _write_in_child(paths: EmbeddedPaths) -> None:
    """Write in a process of its own: transformers' models bring imports that start CUDA, and ranks are forked later."""
    child = multiprocessing.get_context("fork").Process(target=_write, args=(paths,), name="embedded task")
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"writing the embedded task to {paths.train_file.parent} failed; the traceback is above")


def _write(paths: EmbeddedPaths) -> None:
    # Imported here: in the child only.
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3MoeForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        actor = Qwen2ForCausalLM(_actor_config())
        critic = LlamaForCausalLM(_critic_config())
        order = torch.randint(len(_tasks()), (NUM_TRAIN_ROWS,)).tolist()
        moe_actor = Qwen3MoeForCausalLM(_moe_actor_config())
    tokenizer = build_embedded_tokenizer()
    models = ((actor, paths.actor_model), (moe_actor, paths.moe_actor_model), (critic, paths.critic_model))
    for model, path in models:
        model.generation_config = GenerationConfig(**_token_ids(), do_sample=True)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    tasks = _tasks()
    _write_rows(paths.train_file, [tasks[index] for index in order], "train")
    _write_rows(paths.val_file, tasks, "val")


def build_embedded_tokenizer() -> Qwen2Tokenizer:
    """A character-level tokenizer of 16 tokens with a chat template; characters outside its alphabet are dropped.

    It is a Qwen2 tokenizer without merges because AutoTokenizer takes that class for every Qwen2 model, whatever
    the folder's tokenizer_config.json says.
    """
    tokens = _SPECIAL_TOKENS + _ROLE_TOKENS + tuple(_ALPHABET)
    pad, bos, eos = _SPECIAL_TOKENS
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=None,
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in _ROLE_TOKENS])
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _token_ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _shape(hidden_size: int, num_hidden_layers: int) -> dict[str, Any]:
    """What the models' configurations have in common."""
    return {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 256,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": _MAX_POSITIONS,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **_token_ids(),
    }


def _actor_config() -> Qwen2Config:
    return Qwen2Config(**_shape(hidden_size=128, num_hidden_layers=4))


def _moe_actor_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **_shape(hidden_size=128, num_hidden_layers=4),
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        head_dim=64,
    )


def _critic_config() -> LlamaConfig:
    return LlamaConfig(**_shape(hidden_size=256, num_hidden_layers=2))


def _tasks() -> list[tuple[str, str]]:
    """Every question with its answer: "34" with "56789", one to three digits of a run that is to be counted on to 9."""
    digits = "0123456789"
    return [
        (digits[last - length + 1 : last + 1], digits[last + 1 :]) for last in _LAST_DIGITS for length in _RUN_LENGTHS
    ]


def _write_rows(path: Path, tasks: list[tuple[str, str]], split: str) -> None:
    rows: list[dict[str, Any]] = [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": question}],
            "ability": "counting",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": split, "index": index},
        }
        for index, (question, answer) in enumerate(tasks)
    ]
    write_rows(path, rows)


if __name__ == "__main__":
    # For scripts: python -m mrl.data.embedded NAME FOLDER prints where the embedded NAME lies.
    sys.stdout.write(resolve_embedded(PREFIX + sys.argv[1], Path(sys.argv[2])) + "\n")
