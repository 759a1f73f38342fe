"""Section `reward`: what scores, and which combinations of keys contradict each other."""

import pytest

from mrl.config.errors import ConfigError
from mrl.config.load import load_config


def test_without_settings_each_data_source_s_verifier_is_the_reward():
    [(name, part)] = load_config([]).reward.parts.items()
    assert (name, part.path, part.verifier, part.weight) == ("", None, None, 1.0)


def test_a_custom_function_is_the_reward():
    overrides = [f"reward.custom_reward_function.{pair}" for pair in ("path=r.py", "name=f", "reward_kwargs.x=1")]
    [(name, part)] = load_config(overrides).reward.parts.items()
    assert (name, part.path, part.name, dict(part.reward_kwargs)) == ("", "r.py", "f", {"x": 1})


def test_functions_are_named_parts_with_keys_of_their_own():
    overrides = [
        "reward.functions.correct.weight=2",
        "reward.functions.style={path: r.py, name: style, on_failure: raise, timeout_s: 3, reward_kwargs: {x: 1}}",
    ]
    parts = load_config(overrides).reward.parts
    assert (parts["correct"].path, parts["correct"].weight, parts["correct"].on_failure) == (None, 2.0, None)
    style = parts["style"]
    assert (style.path, style.name, style.on_failure, style.timeout_s) == ("r.py", "style", "raise", 3.0)


def test_a_judge_takes_the_place_of_the_verifiers_unless_they_are_asked_for():
    url = "reward.judge.url=http://host:30000/v1"
    assert dict(load_config([url]).reward.parts) == {}
    assert list(load_config([url, "reward.functions.rule={}"]).reward.parts) == ["rule"]
    assert list(load_config([url, "reward.custom_reward_function.path=r.py"]).reward.parts) == ["custom"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("reward.functions.mean={}", r"reward\.functions: 'mean' cannot name a reward"),
        ("reward.functions={a b: {}}", r"reward\.functions: 'a b' cannot name a reward"),
        ("reward.functions.a.wieght=1", r"reward\.functions\.a\.wieght does not exist; there are path, name, verifier"),
        ("reward.functions.a=4", r"reward\.functions\.a = 4 is a section"),
        ("reward.functions.a.weight=heavy", r"reward\.functions\.a\.weight = 'heavy' must be a number"),
        ("reward.functions.a.weight=nan", r"reward\.functions\.a\.weight = nan must be a finite number"),
        ("reward.functions.a.weight=0", r"every weight is 0"),
        ("reward.functions.a.timeout_s=0", r"reward\.functions\.a\.timeout_s = 0.0 must be greater than 0"),
        ("reward.functions.a.verifier=exact", r"reward\.functions\.a\.verifier = 'exact' must be one of 'embedded'"),
        ("reward.functions.a={verifier: gsm8k, path: r.py}", r"path = r\.py and verifier = gsm8k are both set"),
        ("reward.functions.a.name=f", r"name = f is a function of a file, but path is null"),
        ("reward.functions.a={} reward.custom_reward_function.path=r.py", r"path = r\.py and functions = a are both"),
        ("reward.judge.url=localhost", r"reward\.judge\.url = localhost must begin with http"),
        ("reward.judge.prompt_template=Rate", r"prompt_template does not name \{response\}"),
        ("reward.judge.prompt_template='{response} {answer}'", r"names \{answer\}; known are \{prompt\}"),
        ("reward.judge.prompt_template='{response'", r"reward\.judge\.prompt_template: .*braces that are text"),
        ("reward.judge.score_regex='('", r"score_regex = '\(' is not a regular expression"),
        ("reward.judge.score_regex=x", r"score_regex = 'x' has no group"),
        ("reward.judge.score_regex=null", r"exactly one tells where the score is"),
        ("reward.judge.score_schema={type: object}", r"exactly one tells where the score is"),
        ("reward.judge.min_score=10", r"min_score = 10\.0 must be below max_score = 10\.0"),
        ("reward.judge.url=http://x/v1 reward.judge.weight=0", r"every weight is 0"),
        ("reward.on_failure=ignore", r"reward\.on_failure = 'ignore' must be one of 'zero', 'raise'"),
    ],
)
def test_contradictions_and_typos_are_refused(overrides, message):
    split = overrides.split(" reward.")
    with pytest.raises(ConfigError, match=message):
        load_config([split[0], *(f"reward.{rest}" for rest in split[1:])])
