"""Shapes of models by name, file and folder."""

import json

import pytest

from mrl.reshard.families import count_params
from mrl.scale.shapes import known_shapes, load_shape

# Billions of parameters as published: Qwen2.5 arXiv:2412.15115, Llama 3 arXiv:2407.21783, Qwen3 arXiv:2505.09388, and
# the totals of the published safetensors files.
PUBLISHED = {
    "Qwen2.5-7B": 7.62,
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "Llama-3.1-405B": 406,
    "Qwen3-235B-A22B": 235,
}


def test_known_shapes_have_the_published_numbers_of_parameters():
    assert set(known_shapes()) == set(PUBLISHED)
    for name, billions in PUBLISHED.items():
        assert count_params(load_shape(name)) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_folder_and_its_file_are_the_same_shape(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_shape(str(tmp_path)) == load_shape(str(tmp_path / "config.json"))
    assert load_shape(str(tmp_path)).hidden_size == 32


def test_what_is_no_model_is_refused_with_the_known_names(tmp_path):
    with pytest.raises(ValueError, match=r"--model Llama-9 is neither .* one of .*Llama-3\.1-405B"):
        load_shape("Llama-9")
    with pytest.raises(ValueError, match="neither a folder"):
        load_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_shape(str(tmp_path))
