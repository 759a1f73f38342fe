"""The training command's arguments."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mrl.trainer.main_ppo import main


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The command sets up the process's logging, which other tests have their own way."""
    root, package = logging.getLogger(), logging.getLogger("mrl")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    root.handlers[:] = handlers
    for logger, level in zip((root, package), levels, strict=True):
        logger.setLevel(level)


def test_a_command_of_verls_is_understood_up_to_its_keys(capsys):
    arguments = ["--config-path=config", "--config-name=ppo_megatron_trainer.yaml", "trainer.nnodes=0"]
    assert main(arguments) == 2
    assert "trainer.nnodes = 0 must be at least 1" in " ".join(capsys.readouterr().out.split())


def test_keys_may_stand_before_and_after_the_configurations_name(capsys):
    # As a batch script has it, which puts a key first and what it is given behind.
    arguments = ["trainer.nnodes=2", "--config-name=demo", "trainer.launcher=local"]
    assert main(arguments) == 2
    assert "launcher = local starts ranks on one host, but nnodes = 2" in " ".join(capsys.readouterr().out.split())
