import concurrent.futures
import json
import multiprocessing

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from mrl.data.dataset import load_prompts
from mrl.data.embedded import NUM_TRAIN_ROWS, materialise, resolve_embedded
from mrl.data.tokenizer import load_eos_token_ids, load_tokenizer
from mrl.rewards.rules import compute_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="module")
def paths(folder):
    return materialise(folder)


def test_models_are_float32_folders_of_three_families(paths):
    models = (
        (paths.actor_model, "qwen2", 128),
        (paths.moe_actor_model, "qwen3_moe", 128),
        (paths.critic_model, "llama", 256),
    )
    for model, family, width in models:
        config = json.loads((model / "config.json").read_text())
        assert (config["model_type"], config["hidden_size"], config["dtype"]) == (family, width, "float32")
        weights = load_file(model / "model.safetensors")
        assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], width)
        assert "lm_head.weight" in weights, "the embeddings must not be tied"
        assert {tensor.dtype.itemsize for tensor in weights.values()} == {4}
        tokenizer = load_tokenizer(model)
        assert len(tokenizer) == config["vocab_size"]
        assert load_eos_token_ids(model, tokenizer) == (2,)


def test_writing_twice_gives_the_same_bytes(paths, tmp_path):
    again = materialise(tmp_path)
    for model in ("actor_model", "moe_actor_model", "critic_model"):
        first, second = getattr(paths, model), getattr(again, model)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
    assert pq.read_table(paths.train_file) == pq.read_table(again.train_file)


def test_what_exists_is_not_written_again(paths, folder):
    written = paths.train_file.stat().st_mtime_ns
    assert materialise(folder) == paths
    assert paths.train_file.stat().st_mtime_ns == written


def test_many_callers_at_once_see_one_whole_folder(tmp_path):
    # As the tasks of a job are: processes.
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as executor:
        results = list(executor.map(materialise, [tmp_path] * 4))
    assert len(set(results)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [results[0].actor_model.parent.name]
    load_tokenizer(results[0].actor_model)


def test_every_answer_of_the_data_scores_one_and_survives_the_tokenizer(paths):
    tokenizer = load_tokenizer(paths.actor_model)
    train = load_prompts(str(paths.train_file), tokenizer, max_prompt_length=8)
    val = load_prompts(str(paths.val_file), tokenizer, max_prompt_length=8)
    assert len(train) == NUM_TRAIN_ROWS
    questions = {prompt.messages[0]["content"] for prompt in val}
    assert questions == {prompt.messages[0]["content"] for prompt in train}
    for prompt in val:
        question = prompt.messages[0]["content"]
        assert (question + prompt.ground_truth) in "0123456789"
        assert (question + prompt.ground_truth).endswith("9")
        response = tokenizer(prompt.ground_truth)["input_ids"] + [tokenizer.eos_token_id]
        text = tokenizer.decode(response, skip_special_tokens=True)
        assert compute_score(prompt.data_source, text, prompt.ground_truth, prompt.extra_info) == 1.0


def test_embedded_names_resolve_and_others_pass_through(paths, folder):
    assert resolve_embedded("embedded:actor", folder) == str(paths.actor_model)
    assert resolve_embedded("embedded:moe_actor", folder) == str(paths.moe_actor_model)
    assert resolve_embedded("embedded:critic", folder) == str(paths.critic_model)
    assert resolve_embedded("embedded:train", folder) == str(paths.train_file)
    assert resolve_embedded("embedded:val", folder) == str(paths.val_file)
    assert resolve_embedded("~/data/train.parquet", folder) == "~/data/train.parquet"
    with pytest.raises(ValueError, match="unknown embedded path 'embedded:test'; known: embedded:actor"):
        resolve_embedded("embedded:test", folder)
