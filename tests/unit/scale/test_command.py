"""The command line of `mrl plan --model`."""

import logging
import re

import pytest

from mrl.trainer.show_plan import main

GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8")


@pytest.fixture(autouse=True)
def logging_as_before():
    """The command sets up logging for a process of its own."""
    root, ours = logging.getLogger(), logging.getLogger("mrl")
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in (root, ours)]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def run(capfd, *arguments):
    status = main(arguments)
    seen = capfd.readouterr()
    return status, " ".join((seen.out + seen.err).split())


def test_a_job_of_a_shape_is_shown_without_a_gpu_or_weights(capfd):
    status, shown = run(
        capfd, "--model", "Qwen2.5-7B", "--train", "tp=2,pp=2", "--rollout", "tp=4", "--hosts", "2", *GRPO
    )
    assert status == 0
    assert "Qwen2.5-7B on 16 GPUs" in shown
    assert "TP2 x PP2 x DP4 + SP" in shown
    assert "4 x SGLang at TP4" in shown
    # 1 / (8 + 1) of an update with 4 x pp micro-batches.
    assert "11.1%" in shown
    # 7.616 billion parameters over TP2 x PP2, the larger stage with one of the two vocabulary matrices.
    assert re.search(r"actor weights \S* *3\.55 training", shown)
    assert "engine ranks │ 16 of" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "Qwen2.5-9B"], "one of Llama-3.1-405B"),
        (["--model", "Qwen2.5-7B", "--train", "tp=2,xp=2"], "'xp=2' in 'tp=2,xp=2'"),
        (["--model", "Qwen2.5-7B", "--train", "pp=3"], "does not divide world size 8"),
        (["--model", "Qwen2.5-7B", "--hosts", "0"], "--hosts = 0 must be at least 1"),
        (["--model", "Llama-3.1-405B", "--train", "tp=8", "--rollout", "tp=8"], "GiB"),
        (["--model", "Qwen2.5-7B", "--network-gb-s", "-1"], "--network-gb-s = -1"),
        (["--train", "tp=2"], "--train needs --model"),
        (["--micro-batches", "4"], "--micro-batches needs --model"),
        (["--groups", "0"], "--groups needs --model"),
        (["--nvlink-gb-s", "300"], "--nvlink-gb-s needs --model"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(capfd, arguments, message):
    status, shown = run(capfd, *arguments)
    assert status in (1, 2)
    assert message in shown
