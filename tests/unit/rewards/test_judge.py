"""The judge's client against an endpoint that answers what a test wants."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mrl.rewards.judge import JudgeReward, JudgeSettings, NoScoreError, ScoreFormat, find_model
from mrl.rewards.pool import SKIPPED
from mrl.types import Generation, Prompt, Sample


class Endpoint:
    """An OpenAI-compatible server: `answer(request number, user message)` is the completion, or an HTTP status."""

    def __init__(self, answer):
        self.requests, self.headers, self.at_once, self.most_at_once = [], [], 0, 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._send(200, {"object": "list", "data": [{"id": "judge-7b", "object": "model"}]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(request)
                    endpoint.headers.append(dict(self.headers))
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                result = answer(number, request["messages"][-1]["content"])
                with endpoint.lock:
                    endpoint.at_once -= 1
                if isinstance(result, int):
                    self._send(result, {"error": {"message": f"status {result}"}})
                else:
                    message = {"role": "assistant", "content": result}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    self._send(200, {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice]})

            def _send(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                """Write nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def serve():
    endpoints = []

    def start(answer):
        endpoints.append(Endpoint(answer))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def make_samples(*texts, messages=None):
    generation = Generation(response_ids=[5], rollout_log_probs=[-1.0], finish_reason="stop", weight_version=1)
    turns = messages or [{"role": "user", "content": "2 + 2?"}]
    prompt = Prompt(uid="row", token_ids=[1], messages=turns, data_source="s", ground_truth="4")
    return [Sample(prompt=prompt, generation=generation, response_text=text) for text in texts]


def judge(url, **options):
    settings = {"prompt_template": "{prompt}|{response}|{ground_truth}", "score": ScoreFormat(regex=r"S(-?\d+)")}
    return JudgeReward(JudgeSettings(url=url, **{"timeout_s": 60.0, **settings, **options}))


def test_the_judge_is_asked_about_each_sample_and_its_score_is_read(serve):
    endpoint = serve(lambda number, text: f"S1 is my draft. S{len(text.split('|')[1])}")
    scored = judge(endpoint.url, system_prompt="Be fair.", max_new_tokens=9, request_kwargs={"top_p": 0.5}).score(
        make_samples("four", "4"), stop_at_failure=True
    )
    assert [(outcome.score, outcome.error) for outcome in scored] == [(4.0, None), (1.0, None)]
    request = min(endpoint.requests, key=lambda each: len(each["messages"][1]["content"]))
    assert request == {
        "model": "judge-7b",
        "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "2 + 2?|4|4"}],
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
    }


def test_a_conversation_is_shown_turn_by_turn_and_braces_in_it_are_text(serve):
    endpoint = serve(lambda number, text: "S1")
    turns = [{"role": "system", "content": "s {x}"}, {"role": "user", "content": "u"}]
    judge(endpoint.url, prompt_template="{{}} {prompt} / {response}").score(
        make_samples("{response}", messages=turns), stop_at_failure=True
    )
    assert endpoint.requests[0]["messages"][-1]["content"] == "{} system: s {x}\n\nuser: u / {response}"


def test_an_overloaded_endpoint_is_asked_again(serve):
    endpoint = serve(lambda number, text: 503 if number == 0 else "S3")
    [outcome] = judge(endpoint.url, max_retries=1).score(make_samples("4"), stop_at_failure=True)
    assert (outcome.score, outcome.error, len(endpoint.requests)) == (3.0, None, 2)
    endpoint = serve(lambda number, text: 503)
    [outcome] = judge(endpoint.url, max_retries=0).score(make_samples("4"), stop_at_failure=False)
    assert outcome.error.startswith("got no answer from the judge: InternalServerError")


def test_failures_are_the_sample_s_own(serve):
    release = threading.Event()
    answers = {"late": lambda: release.wait(60) and "S1", "odd": lambda: "no idea", "ok": lambda: "S2"}
    endpoint = serve(lambda number, text: answers[text.split("|")[1]]())
    scored = judge(endpoint.url, timeout_s=3.0, max_retries=0).score(
        make_samples("late", "odd", "ok"), stop_at_failure=False
    )
    release.set()
    late, odd, ok = (outcome.error for outcome in scored)
    assert "longer than its time limit of 3 s" in late or "APITimeoutError" in late
    assert "got an answer without" in odd
    assert "no idea" in odd
    assert (ok, scored[2].score) == (None, 2.0)


def test_the_first_failure_stops_the_rest_if_it_ends_the_run(serve):
    release = threading.Event()
    endpoint = serve(lambda number, text: "nothing" if "bad" in text else release.wait(60) and "S1")
    begin = time.monotonic()
    failed, waiting = judge(endpoint.url).score(make_samples("bad", "slow"), stop_at_failure=True)
    release.set()
    assert failed.error is not None
    assert waiting is SKIPPED
    assert time.monotonic() - begin < 50


def test_requests_under_way_are_limited(serve):
    endpoint = serve(lambda number, text: time.sleep(0.02) or "S1")
    scored = judge(endpoint.url, max_concurrent=2).score(make_samples(*"abcdef"), stop_at_failure=True)
    assert [outcome.score for outcome in scored] == [1.0] * 6
    assert endpoint.most_at_once <= 2


def test_the_token_is_read_from_the_environment(serve, monkeypatch):
    endpoint = serve(lambda number, text: "S1")
    monkeypatch.setenv("MY_JUDGE_TOKEN", "sesame")
    judge(endpoint.url, api_key_env="MY_JUDGE_TOKEN").score(make_samples("4"), stop_at_failure=True)
    assert endpoint.headers[0]["Authorization"] == "Bearer sesame"
    monkeypatch.delenv("MY_JUDGE_TOKEN")
    with pytest.raises(ValueError, match="MY_JUDGE_TOKEN is not set"):
        judge(endpoint.url, api_key_env="MY_JUDGE_TOKEN")


def test_a_judge_that_is_not_there_is_named(serve):
    endpoint = serve(lambda number, text: "S1")

    def settings(url, model=None):
        return JudgeSettings(url=url, model=model, prompt_template="{response}", score=ScoreFormat(regex="(x)"))

    assert find_model(settings(endpoint.url)) == find_model(settings(endpoint.url, "judge-7b")) == "judge-7b"
    with pytest.raises(ValueError, match=r"serves judge-7b, not other"):
        find_model(settings(endpoint.url, "other"))
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/v1 does not answer .*mrl serve-judge"):
        find_model(settings("http://127.0.0.1:9/v1"))


SCHEMA = {"type": "object", "required": ["score"], "properties": {"score": {"type": "number", "maximum": 10}}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"score": 7, "clarity": 0.5, "why": "x", "ok": true}', (7.0, {"clarity": 0.5})),
        ('Sure:\n```json\n{"score": 2.5}\n```', (2.5, {})),
        ('{"score": 11}', "breaks the schema: 11 is greater than the maximum"),
        ('{"clarity": 1}', "breaks the schema: 'score' is a required property"),
        ("7", "breaks the schema"),
        ("seven", "is not JSON"),
    ],
)
def test_scores_are_read_from_json(answer, expected):
    score_format = ScoreFormat(schema=SCHEMA)
    if isinstance(expected, tuple):
        assert score_format.read(answer)[:2] == expected
    else:
        with pytest.raises(NoScoreError, match=expected):
            score_format.read(answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("S3", 3.0), ("S3, no: S0", 0.0), ("S11", "score 11, which is outside"), ("S-1", "outside"), ("3", "without")],
)
def test_scores_outside_their_range_are_none(answer, expected):
    score_format = ScoreFormat(regex=r"S(-?\d+)", minimum=0.0, maximum=10.0)
    if isinstance(expected, float):
        assert score_format.read(answer).score == expected
    else:
        with pytest.raises(NoScoreError, match=expected):
            score_format.read(answer)


def test_a_group_that_is_no_number_is_no_score():
    with pytest.raises(NoScoreError, match="'x' for a score, which is no number"):
        ScoreFormat(regex="S(.)").read("Sx")
