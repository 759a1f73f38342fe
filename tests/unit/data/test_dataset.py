import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrl.data.dataset import load_prompts
from mrl.data.embedded import build_embedded_tokenizer
from mrl.data.rows import read_rows, write_rows

BOS, USER, ZERO = 1, 4, 6


def digits(text):
    return [ZERO + int(character) for character in text]


def test_messages_go_through_the_chat_template(tokenizer, write_prompts, user):
    path = write_prompts([user("34"), user("5")])
    dataset = load_prompts(path, tokenizer, max_prompt_length=8)
    first, second = dataset
    assert first.token_ids == [BOS, USER, *digits("34")]
    assert second.token_ids == [BOS, USER, *digits("5")]
    assert (first.uid, second.uid) == (f"{path}:0", f"{path}:1")
    assert first.messages == user("34")
    assert (first.data_source, first.ground_truth, second.extra_info) == ("embedded/counting", "6789", {"index": 1})
    assert (dataset.num_rows, dataset.num_filtered, dataset.num_truncated) == (2, 0, 0)


def test_template_arguments_are_passed_on(write_prompts, user):
    tokenizer = build_embedded_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ suffix }}"
    dataset = load_prompts(
        write_prompts([user("3")]), tokenizer, max_prompt_length=8, apply_chat_template_kwargs={"suffix": "99"}
    )
    assert dataset[0].token_ids == digits("399")


def test_keys_that_a_message_does_not_have_are_not_made_up(tokenizer, write_prompts):
    # Parquet stores one set of keys for all messages.
    conversation = [{"role": "user", "content": "3", "name": "x"}, {"role": "assistant", "content": "4"}]
    dataset = load_prompts(write_prompts([conversation]), tokenizer, max_prompt_length=8)
    assert dataset[0].messages == conversation


def test_a_plain_string_is_tokenized_as_it_stands(write_prompts):
    tokenizer = build_embedded_tokenizer()
    tokenizer.chat_template = None
    assert load_prompts(write_prompts(["345"]), tokenizer, max_prompt_length=8)[0].token_ids == digits("345")


def test_several_files_and_another_prompt_column(tokenizer, tmp_path, user):
    paths = []
    for name in ("a", "b"):
        row = {"question": user("3"), "task": f"source-{name}", "reward_model": {"ground_truth": 1}}
        write_rows(tmp_path / name, [row, row])
        paths.append(str(tmp_path / name))
    prompts = load_prompts(paths, tokenizer, max_prompt_length=8, prompt_key="question", reward_fn_key="task")
    assert [prompt.data_source for prompt in prompts] == ["source-a"] * 2 + ["source-b"] * 2
    assert len({prompt.uid for prompt in prompts}) == 4
    assert prompts[0].extra_info == {}


def test_max_samples_takes_the_first_rows_over_all_files(tokenizer, write_prompts, user):
    paths = [write_prompts([user("1"), user("2")], "a"), write_prompts([user("3"), user("4")], "b")]
    for count, texts in ((1, "1"), (3, "123"), (9, "1234"), (-1, "1234")):
        prompts = load_prompts(paths, tokenizer, max_prompt_length=8, max_samples=count)
        assert [prompt.messages[0]["content"] for prompt in prompts] == list(texts)
    with pytest.raises(ValueError, match="max_samples = 0"):
        load_prompts(paths, tokenizer, max_prompt_length=8, max_samples=0)


def test_overlong_prompts_are_filtered_and_counted(tokenizer, write_prompts, user, caplog):
    caplog.set_level(logging.INFO)
    path = write_prompts([user("12345"), user("3"), user("123")])
    dataset = load_prompts(path, tokenizer, max_prompt_length=5, filter_overlong_prompts=True)
    assert [prompt.uid for prompt in dataset] == [f"{path}:1", f"{path}:2"]
    assert (dataset.num_rows, dataset.num_filtered, dataset.num_truncated) == (3, 1, 0)
    assert "2 prompts of 3 rows; 1 filtered and 0 truncated at 5 tokens" in caplog.text


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [("left", digits("23456")), ("right", [BOS, USER, *digits("012")]), ("middle", [BOS, USER, *digits("456")])],
)
def test_overlong_prompts_are_truncated_and_counted(tokenizer, write_prompts, user, truncation, kept):
    path = write_prompts([user("0123456"), user("3")])
    dataset = load_prompts(path, tokenizer, max_prompt_length=5, truncation=truncation)
    assert dataset[0].token_ids == kept
    assert dataset[1].token_ids == [BOS, USER, *digits("3")]
    assert (dataset.num_filtered, dataset.num_truncated) == (0, 1)


def test_an_overlong_prompt_is_an_error_by_default(tokenizer, write_prompts, user):
    path = write_prompts([user("3"), user("012345")])
    with pytest.raises(ValueError, match=r"train.parquet:1 has 8 tokens, max_prompt_length is 5; raise"):
        load_prompts(path, tokenizer, max_prompt_length=5)


def test_filtering_all_prompts_is_an_error(tokenizer, write_prompts, user):
    path = write_prompts([user("01234"), user("0123")])
    with pytest.raises(ValueError, match=r"all 2 prompts of .*train.parquet are longer .* = 3 tokens .*shortest has 6"):
        load_prompts(path, tokenizer, max_prompt_length=3, filter_overlong_prompts=True)


def test_messages_without_a_template_are_an_error(write_prompts, user):
    tokenizer = build_embedded_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"train.parquet:0 holds chat messages, but .* has no chat template"):
        load_prompts(write_prompts([user("3")]), tokenizer, max_prompt_length=8)


def test_a_template_that_refuses_a_row_names_it(write_prompts, user):
    tokenizer = build_embedded_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only system turns') }}"
    with pytest.raises(ValueError, match=r"train.parquet:0: the chat template failed: .*only system turns"):
        load_prompts(write_prompts([user("3")]), tokenizer, max_prompt_length=8)


def test_a_prompt_without_tokens_is_an_error(tokenizer, write_prompts):
    with pytest.raises(ValueError, match=r"train.parquet:0: prompt '\?\?' has no token"):
        load_prompts(write_prompts(["??"]), tokenizer, max_prompt_length=8)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"max_prompt_length": 0}, "max_prompt_length = 0"), ({"truncation": "top"}, "'top' must be one of error, left")],
)
def test_arguments_out_of_range_are_refused(tokenizer, write_prompts, user, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_prompts(write_prompts([user("3")]), tokenizer, **{"max_prompt_length": 8, **arguments})


def test_a_missing_column_names_those_present(write_prompts, user):
    path = write_prompts([user("3")])
    with pytest.raises(ValueError, match=r"has no column 'question'; its columns are \['data_source', 'prompt'"):
        read_rows(path, prompt_key="question")


def test_missing_empty_and_unreadable_files_are_refused(tmp_path):
    missing, empty, text = (tmp_path / name for name in ("missing", "empty", "text"))
    empty.touch()
    text.write_text("data_source,prompt\n")
    for path, complaint in ((missing, "does not exist"), (tmp_path, "is not a file"), (empty, "0 bytes")):
        with pytest.raises(ValueError, match=complaint):
            read_rows(str(path))
    with pytest.raises(ValueError, match=rf"cannot read {text} as parquet"):
        read_rows(str(text))
    with pytest.raises(ValueError, match="no data files"):
        read_rows([])


def test_a_truncated_file_is_refused(write_prompts, user, tmp_path):
    whole = (tmp_path / write_prompts([user("3")])).read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*half as parquet"):
        read_rows(str(tmp_path / "half"))


def test_a_file_without_rows_is_refused(tmp_path):
    columns = {"data_source": pa.string(), "prompt": pa.string(), "reward_model": pa.string()}
    pq.write_table(pa.schema(columns.items()).empty_table(), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet has no rows"):
        read_rows(str(tmp_path / "none.parquet"))


@pytest.mark.parametrize(
    ("prompt", "columns", "complaint"),
    [
        ("", {}, "column 'prompt' holds ''"),
        (None, {}, "column 'prompt' holds None"),
        ([], {}, r"column 'prompt' holds \[\]"),
        (["text"], {}, r"holds \['text'\]; expected text or a list of messages"),
        (7, {}, "holds 7"),
        ("3", {"reward_model": {"style": "rule"}}, "must be a mapping with a 'ground_truth'"),
        ("3", {"reward_model": "rule"}, "must be a mapping with a 'ground_truth'"),
        ("3", {"data_source": 3}, "data_source = 3 must be a string"),
    ],
)
def test_a_bad_row_is_named(write_prompts, prompt, columns, complaint):
    with pytest.raises(ValueError, match=rf"row .*train.parquet:0: .*{complaint}"):
        read_rows(write_prompts([prompt], **columns))


def test_writing_is_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="no rows to write"):
        write_rows(tmp_path / "x.parquet", [])
    write_rows(tmp_path / "x.parquet", [{"a": 1}])
    with pytest.raises(pa.ArrowException):
        write_rows(tmp_path / "x.parquet", [{"a": 1}, {"a": object()}])
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == [{"a": 1}]
