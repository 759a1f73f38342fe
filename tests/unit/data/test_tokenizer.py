import json

import pytest

from mrl.data.tokenizer import load_eos_token_ids, load_tokenizer


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def edit_json(path, **changes):
    content = {**json.loads(path.read_text()), **changes} if path.exists() else changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_tokenizer_comes_back_as_it_was_saved(tokenizer, folder):
    loaded = load_tokenizer(folder)
    assert loaded("0123456789")["input_ids"] == tokenizer("0123456789")["input_ids"] == list(range(6, 16))
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.chat_template == tokenizer.chat_template


def test_without_a_padding_token_the_end_of_sequence_pads(folder):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id == 2


def test_a_tokenizer_without_an_end_of_sequence_is_refused(folder):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>").save_pretrained(folder)
    with pytest.raises(ValueError, match="names no eos_token"):
        load_tokenizer(folder)


def test_folders_without_a_usable_tokenizer_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"gone does not exist; download"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "bare").mkdir()
    edit_json(tmp_path / "bare" / "config.json", model_type="qwen2")
    with pytest.raises(ValueError, match=r"bare holds no tokenizer \(none of tokenizer.json"):
        load_tokenizer(tmp_path / "bare")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load the tokenizer of"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("listed", "ids"), [([9, 8], (2, 8, 9)), (8, (2, 8)), (2, (2,)), (None, (2,))])
def test_end_of_sequence_ids_include_those_of_the_generation_config(tokenizer, folder, listed, ids):
    edit_json(folder / "config.json", eos_token_id=5)
    edit_json(folder / "generation_config.json", eos_token_id=listed, do_sample=True)
    assert load_eos_token_ids(folder, tokenizer) == ids


def test_end_of_sequence_ids_come_from_the_model_config_without_a_generation_config(tokenizer, folder):
    edit_json(folder / "config.json", eos_token_id=[5, 6])
    assert load_eos_token_ids(folder, tokenizer) == (2, 5, 6)


def test_a_broken_generation_config_is_refused(tokenizer, folder):
    edit_json(folder / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match="eos_token_id = '</s>' must be an integer or a list"):
        load_eos_token_ids(folder, tokenizer)
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config.json is not a JSON object"):
        load_eos_token_ids(folder, tokenizer)
