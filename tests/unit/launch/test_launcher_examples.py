"""The scripts for torchrun, srun and Ray: each starts the training command with keys that exist and a job that fits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mrl.config.load import load_config
from mrl.trainer.machine import Machine
from mrl.trainer.plan import RunPlan, plan_run

EXAMPLES = Path(__file__).parents[3] / "examples"
LLAMA_31_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
QWEN2_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
H100 = Machine(device="cuda", host_bytes=1000 * 2**30, gpu_bytes=80 * 2**30)
# What each script starts, and how many tasks of it there are for each host.
SCRIPTS = {
    "torchrun/one_host_4gpu.sh": ("torchrun", "--standalone --nproc-per-node=4", QWEN2_7B),
    "torchrun/two_hosts_16gpu.sh": ("torchrun", "--nnodes=2 --nproc-per-node=8", LLAMA_31_8B),
    "slurm/one_host_4gpu.sbatch": ("srun", "--cpus-per-task=7 python", QWEN2_7B),
    "slurm/two_hosts_16gpu.sbatch": ("srun", "--cpus-per-task=7 --kill-on-bad-exit=1 python", LLAMA_31_8B),
    "ray/one_host_4gpu.sh": ("python", "", QWEN2_7B),
    "ray/two_hosts_16gpu.sh": ("python", "", LLAMA_31_8B),
    "ray/submit_16gpu.sh": ("ray", "job submit --address=http://127.0.0.1:8265 -- python", LLAMA_31_8B),
}


def started_by(script: str, folder: Path) -> list[str]:
    """The command that a script would start, word by word."""
    for name in ("torchrun", "srun", "python", "ray"):
        stub = folder / name
        stub.write_text('#!/bin/sh\nprintf "%s\\0" "$(basename "$0")" "$@"\n')
        stub.chmod(0o755)
    places = {"MODEL": str(folder / "model"), "DATA": str(folder), "RUN": str(folder / "run"), "HOST0": "10.0.0.1"}
    places["SLURM_CPUS_PER_TASK"] = "7"
    printed = subprocess.run(
        ["sh", str(EXAMPLES / script), "trainer.project_name=mine"],
        env={**os.environ, **places, "PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return printed.stdout.rstrip("\0").split("\0")


def planned(overrides: list[str], folder: Path, model: dict[str, object]) -> RunPlan:
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(model))
    config = load_config(overrides)
    assert config.trainer.project_name == "mine"
    return plan_run(config, H100)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_a_job_that_can_run(tmp_path, script):
    program, options, model = SCRIPTS[script]
    words = started_by(script, tmp_path)
    module = words.index("mrl.trainer.main_ppo")
    assert words[0] == program
    assert " ".join(words[1 : module - 1]).startswith(options)
    assert words[module - 1] == "-m"
    plan = planned(words[module + 1 :], tmp_path, model)
    if model is LLAMA_31_8B:
        assert (plan.world_size, plan.rollout_tp, plan.num_engines) == (16, 16, 1)
        assert str(plan.actor.layout) == "TP8 x PP1 x DP2 + SP"
    else:
        assert (plan.world_size, plan.rollout_tp, plan.num_engines) == (4, 2, 2)


def test_a_pretrained_model_without_a_hub_is_planned_on_one_gpu(tmp_path):
    show = tmp_path / "show.sh"
    show.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    show.chmod(0o755)
    for name, text in {"model/config.json": json.dumps(SMOLLM2), "counting/train.parquet": ""}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    printed = subprocess.run(
        ["sh", "examples/smollm2_gpu.sh", str(tmp_path)],
        env={**os.environ, "PYTHON": str(show)},
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    _, module, *overrides = printed.stdout.rstrip("\0").split("\0")
    assert module == "mrl.trainer.main_ppo"
    plan = plan_run(load_config(overrides), H100)
    assert (plan.world_size, plan.num_engines, plan.device) == (1, 1, "cuda")
    assert plan.critic is not None


def test_every_script_is_tested():
    folders = {name.partition("/")[0] for name in SCRIPTS}
    found = {str(path.relative_to(EXAMPLES)) for folder in folders for path in (EXAMPLES / folder).iterdir()}
    assert found == set(SCRIPTS)
