import pytest

from mrl.rewards import embedded, gsm8k, reasoning_gym, rules


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("6789", 1.0),
        ("", 0.0),
        ("6", 1 / 4),
        ("678", 3 / 4),
        ("67890", 4 / 5),
        ("67896789", 4 / 8),
        ("7890", 2 / 4),
        ("9999", 0.0),
        ("6<user>", 1 / 7),
        ("a789", 2 / 4),
    ],
)
def test_embedded_score_is_the_share_that_counts_on(response, score):
    assert embedded.compute_score(embedded.DATA_SOURCE, response, "6789") == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("2 + 2 = 4\n#### 4", 1.0),
        ("#### 5\nno, wait\n#### 4", 1.0),
        ("#### 4\nno, wait\n#### 5", 0.0),
        ("####4.", 1.0),
        ("#### $4.00 ", 1.0),
        ("#### 4 apples", 0.0),
        ("the answer is 4", 0.0),
        ("####", 0.0),
        ("#### nan", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_strict_wants_the_number_after_the_marker(response, score):
    assert gsm8k.compute_score(gsm8k.DATA_SOURCE, response, "4") == score


def test_gsm8k_ignores_thousands_separators():
    assert gsm8k.compute_score(gsm8k.DATA_SOURCE, "#### 1,200", "1200") == 1.0
    assert gsm8k.compute_score(gsm8k.DATA_SOURCE, "#### 1200", "1,200") == 1.0


@pytest.mark.parametrize(
    ("response", "score"),
    [(r"so \boxed{\frac{8}{2}}", 1.0), ("The answer is 4.", 1.0), ("#### 4", 1.0), ("It is 5.", 0.0), ("none", 0.0)],
)
def test_gsm8k_flexible_finds_the_answer_anywhere(response, score):
    assert rules.compute_score(gsm8k.DATA_SOURCE, response, "4", {}, gsm8k_method="flexible") == score


def test_gsm8k_refuses_a_ground_truth_or_method_it_does_not_know():
    with pytest.raises(ValueError, match="'four' of openai/gsm8k is not a number"):
        gsm8k.compute_score(gsm8k.DATA_SOURCE, "#### 4", "four")
    with pytest.raises(ValueError, match="'loose' must be 'strict' or 'flexible'"):
        gsm8k.compute_score(gsm8k.DATA_SOURCE, "#### 4", "4", gsm8k_method="loose")


def test_reasoning_gym_scores_by_the_entry_with_the_task_s_own_verifier():
    import reasoning_gym as package

    # countdown accepts every expression that reaches the target, which takes the entry's metadata to know.
    entry = package.create_dataset("countdown", size=1, seed=5)[0]
    extra_info = {reasoning_gym.ENTRY_KEY: reasoning_gym.encode_entry(entry)}
    source = reasoning_gym.PREFIX + "countdown"
    right = f"think <answer>0</answer> again <answer> {entry['answer']} </answer>"
    swapped = f"<answer>({entry['answer']})</answer>"
    assert rules.compute_score(source, right, entry["answer"], extra_info) == 1.0
    assert rules.compute_score(source, swapped, entry["answer"], extra_info) == 1.0
    assert rules.compute_score(source, "<answer>1</answer>", entry["answer"], extra_info) < 0.1
    assert rules.compute_score(source, entry["answer"], entry["answer"], extra_info) == 0.0


def test_reasoning_gym_names_what_is_missing():
    with pytest.raises(ValueError, match="'entry'"):
        rules.compute_score("reasoning_gym/countdown", "<answer>1</answer>", "1", {})
    extra_info = {reasoning_gym.ENTRY_KEY: "{}"}
    with pytest.raises(ValueError, match="no_such_task"):
        rules.compute_score("reasoning_gym/no_such_task", "<answer>1</answer>", "1", extra_info)


def test_reasoning_gym_entries_survive_the_row():
    entry = {
        "question": "q",
        "metadata": {"pairs": ((1, 2.5), [None, True]), 3: "int key", "a": {(1,): "b"}},
    }
    decoded = reasoning_gym.decode_entry(reasoning_gym.encode_entry(entry))
    assert repr(decoded) == repr(entry)
    with pytest.raises(ValueError, match=r"cannot store a builtins.set"):
        reasoning_gym.encode_entry({"metadata": {1, 2}})


@pytest.mark.parametrize("source", ["", "gsm8k", "reasoning_gym/"])
def test_unknown_data_source_is_refused(source):
    with pytest.raises(ValueError, match="known: embedded/counting, openai/gsm8k"):
        rules.compute_score(source, "", "")
