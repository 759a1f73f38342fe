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


@pytest.mark.parametrize(
    ("response", "options", "score"),
    [
        ("Paris", {}, 1.0),
        ("  Paris \n", {}, 1.0),
        ("paris", {}, 0.0),
        ("paris", {"ignore_case": True}, 1.0),
        ("It is Paris", {}, 0.0),
        ("<a>Rome</a> no, <a>Paris</a>", {"pattern": "<a>(.*?)</a>"}, 1.0),
        ("<a>Paris</a> no, <a>Rome</a>", {"pattern": "<a>(.*?)</a>"}, 0.0),
        ("Paris", {"pattern": "<a>(.*?)</a>"}, 0.0),
    ],
)
def test_exact_match_compares_the_answer(response, options, score):
    assert rules.compute_score("any", response, "Paris", {}, verifier="exact_match", **options) == score
    assert rules.compute_score("any", response, ["Lyon", "Paris"], {}, verifier="exact_match", **options) == score


def test_exact_match_needs_something_to_compare_with():
    with pytest.raises(ValueError, match="nothing to compare with"):
        rules.compute_score("any", "x", None, {}, verifier="exact_match")


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"age": 3}', 1.0),
        ('Here:\n```json\n{"age": 3}\n```\n', 1.0),
        ('```\n{"age": "x"}\n```\nbetter:\n```json\n{"age": 3}\n```', 1.0),
        ('{"age": "3"}', 0.0),
        ('{"age": NaN}', 0.0),
        ('{"age": 3', 0.0),
        ("", 0.0),
    ],
)
def test_json_schema_wants_a_document_that_the_schema_accepts(response, score):
    import json

    assert rules.compute_score("any", response, "4", {}, verifier="json_schema", schema=SCHEMA) == score
    assert rules.compute_score("any", response, SCHEMA, {}, verifier="json_schema") == score
    assert rules.compute_score("any", response, json.dumps(SCHEMA), {}, verifier="json_schema") == score


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [({"type": "text"}, "not a JSON Schema: 'text' is not valid"), ("{", "is not JSON"), (4, "must be a mapping")],
)
def test_json_schema_refuses_what_is_no_schema(schema, complaint):
    with pytest.raises(ValueError, match=complaint):
        rules.compute_score("any", "{}", schema, {}, verifier="json_schema")


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        (r"so \boxed{\frac{1}{2}}", True),
        ("The final answer is $0.5$.", True),
        (r"\boxed{2} is wrong, it is \boxed{\frac{2}{4}}", True),
        (r"\boxed{\frac{1}{3}}", False),
        (r"\boxed{\frac{1}{2}} no, \boxed{\frac{1}{3}}", False),
        (r"\boxed{\frac{1}{2", False),
        ("Answer: 3\nAnswer: 1/2\nI checked it 7 times", True),
        ("I do not know", False),
    ],
)
def test_math_verify_compares_by_meaning(response, correct):
    for source, wrong in (("HuggingFaceH4/MATH-500", 0.0), ("math_dapo", -1.0), ("aime24", -1.0), ("numina_cn_k12", 0)):
        result = rules.compute_score(source, response, r"\frac{1}{2}")
        assert result == {"score": 1.0 if correct else wrong, "acc": float(correct)}


def test_math_verify_refuses_a_ground_truth_that_is_no_formula():
    with pytest.raises(ValueError, match="ground_truth '' is not a formula"):
        rules.compute_score("math_dapo", "4", "")


def test_configured_verifiers_win_over_the_built_in_routes():
    verifiers = {"openai/gsm8k": {"name": "gsm8k", "gsm8k_method": "flexible"}, "my_*": "exact_match"}
    assert rules.choose("openai/gsm8k", verifiers=verifiers) == ("gsm8k", {"gsm8k_method": "flexible"})
    assert rules.choose("my_task", verifiers=verifiers) == ("exact_match", {})
    assert rules.choose("math_dapo", verifiers=verifiers) == ("math_verify", {"wrong_score": -1.0})
    assert rules.choose("math_dapo", verifiers={"*": "exact_match"}) == ("exact_match", {})
    assert rules.missing_library("my_task", {"verifiers": verifiers}) is None


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("exactly", "'mine'.*no verifier 'exactly'; there are embedded, exact_match"),
        ({"name": "exact_match", "ignorecase": True}, "takes pattern, ignore_case, not ignorecase"),
        ({"name": "embedded", "x": 1}, "takes no argument, not x"),
        ({"ignore_case": True}, "must be a verifier's name, or a mapping"),
        ({"name": "exact_match", "pattern": "("}, "not a regular expression"),
        ({"name": "exact_match", "pattern": "x"}, "has no group"),
        ({"name": "json_schema", "schema": {"type": "text"}}, "not a JSON Schema"),
        ({"name": "gsm8k", "gsm8k_method": "loose"}, "'loose' must be 'strict' or 'flexible'"),
    ],
)
def test_configured_verifiers_are_checked(value, complaint):
    with pytest.raises(ValueError, match=complaint):
        rules.check_verifiers({"mine": value})


def test_the_schema_s_verifiers_are_those_that_exist():
    from typing import get_args

    from mrl.config.reward import Verifier

    assert set(get_args(Verifier)) == set(rules.VERIFIERS)
