"""The command line of the check where it needs no engine: what it refuses, and with which status."""

import json

import pytest

from mrl.parallel.layout import ParallelLayout
from mrl.reshard.check import main, training_layout

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_a_layout_is_read_from_its_axes():
    assert training_layout("tp=2, pp=2,vpp=2,dp=3") == ParallelLayout(world_size=12, tp=2, pp=2, vpp=2)
    assert training_layout("cp=2,vpp=1") == ParallelLayout(world_size=2, cp=2)
    assert training_layout("dp=4,ep=2,etp=2") == ParallelLayout(world_size=4, ep=2, etp=2)


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=x", "zp=2", "tp=2,tp=2", "tp=-1", ""])
def test_a_layout_that_is_not_understood_is_quoted(text):
    with pytest.raises(ValueError, match="is not one of the axes tp, pp, vpp, cp, dp"):
        training_layout(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "tp=3"], "not divisible by the Megatron tensor parallel size 3"),
        (["--train", "pp=4"], "num_hidden_layers = 2 is not divisible"),
        (["--rollout", "tp=3"], "not divisible by the SGLang tensor parallel size 3"),
        (["--layers", "3", "--train", "pp=2"], "num_hidden_layers = 3 is not divisible"),
        (["--train", "tp=2,zp=1"], "'zp=1' in 'tp=2,zp=1'"),
    ],
)
def test_a_request_that_cannot_be_run_exits_with_2_and_says_why(model, capsys, arguments, message):
    assert main(["--model", model, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_without_a_config_exits_with_2(tmp_path, capsys):
    assert main(["--model", str(tmp_path)]) == 2
    assert "does not exist" in " ".join(capsys.readouterr().err.split())
