"""The training command's arguments."""

from __future__ import annotations

from mrl.trainer.main_ppo import main


def test_keys_may_stand_before_and_after_the_configurations_name(capsys):
    # As a batch script has it, which puts a key first and what it is given behind.
    arguments = ["trainer.nnodes=2", "--config-name=demo", "trainer.launcher=local"]
    assert main(arguments) == 2
    assert "launcher = local starts ranks on one host, but nnodes = 2" in " ".join(capsys.readouterr().out.split())
