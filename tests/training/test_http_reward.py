"""Rewards from a server: real HTTP on loopback, with all that can go wrong."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from perlcli import web
from perlcli.errors import PerlError
from perlcli.run.record import read_record
from perlcli.training.http_reward import HttpReward, connect

Answer = tuple[int, Any]  # status and body
Perl = Callable[..., Any]
MOVED = 301


class Server:
    """Answers with what `answers` has, one after another and the last one again; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[Callable[[Any], Answer]] = [lambda asked: (200, [1.0] * len(asked["completions"]))]
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(asked)
                server.headers.append(dict(self.headers))
                answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                status, body = answer(asked)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == MOVED:
                    self.send_header("Location", "/new")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(web, "PAUSE", 0.01)
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_a_server_gets_prompts_completions_and_columns(server: Server) -> None:
    server.answers = [lambda asked: (200, [2.5, None])]
    reward = connect(server.url, {})
    found = reward(prompts=["a", "b"], completions=["c", "d"], order=[1, None], completion_ids=[[5], [6]])
    assert found == [2.5, None]
    assert server.asked == [{"prompts": ["a", "b"], "completions": ["c", "d"], "columns": {"order": [1, None]}}]


def test_many_completions_go_in_batches(server: Server) -> None:
    server.answers = [lambda asked: (200, {"rewards": [float(each) for each in asked["completions"]]})]
    reward = connect(server.url, {"batch_size": 2})
    numbers = [str(number) for number in range(5)]
    assert reward(prompts=numbers, completions=numbers, same=numbers) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [asked["columns"]["same"] for asked in server.asked] == [["0", "1"], ["2", "3"], ["4"]]


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.answers[:0] = [lambda _: (503, "busy"), lambda _: (429, "slow down")]
    assert connect(server.url, {})(prompts=["a"], completions=["b"]) == [1.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((400, b"no such model"), "answered 400 Bad Request: 'no such model'"),
        ((500, b"boom"), "answered 500 Internal Server Error: 'boom'"),
        ((200, b"fine"), "answered with something that isn.t JSON: 'fine'"),
        ((200, 1.0), "must answer with a list of numbers, not 1.0"),
        ((200, [True]), "must answer with a list of numbers, not .*True"),
        ((200, {"scores": [1.0]}), "must answer with a list of numbers"),
        ((200, [1.0, 2.0]), "answered with 2 rewards for 1 completions"),
        ((200, b"[" * 100_000), "answered with something that isn.t JSON"),
    ],
)
def test_a_wrong_answer_is_an_error(server: Server, answer: Answer, problem: str) -> None:
    server.answers = [lambda _: answer]
    with pytest.raises(PerlError, match=f"^The reward server {server.url} {problem}"):
        connect(server.url, {"retries": 1})(prompts=["a"], completions=["b"])


def test_a_server_that_redirects_is_an_error(server: Server) -> None:
    """A client that follows would ask again without the completions."""
    server.answers = [lambda _: (MOVED, b"")]
    new = server.url.replace("/score", "/new")
    with pytest.raises(PerlError, match=f"redirects to {new}\nHint: --reward {new}"):
        connect(server.url, {})(prompts=["a"], completions=["b"])


def test_a_slow_server_is_an_error(server: Server) -> None:
    def slow(_: Any) -> Answer:
        time.sleep(0.4)
        return 200, [1.0]

    server.answers = [slow]
    reward = connect(server.url, {"timeout": 0.05, "retries": 1})
    with pytest.raises(PerlError, match=r"did not answer, after 2 tries: .*[Tt]ime"):
        reward(prompts=["a"], completions=["b"])


def test_a_server_that_is_gone_is_an_error(server: Server) -> None:
    reward = connect(server.url, {"retries": 1})
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(PerlError, match=r"did not answer, after 2 tries: ConnectionRefusedError"):
        reward(prompts=["a"], completions=["b"])


def test_a_server_that_is_not_there_is_refused_before_anything_loads(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(PerlError, match=rf"^--reward http://127.0.0.1:{port}/ can't be reached: Connection refused\nH"):
        connect(f"http://127.0.0.1:{port}/", {})


@pytest.mark.parametrize(
    ("url", "problem"),
    [("http://", "is not an address"), ("http://host:99999/", "is not an address: Port out of range"),
     ("http://user:word@127.0.0.1/", "must not have a login in its address")],
)  # fmt: skip
def test_a_bad_address_is_refused(url: str, problem: str) -> None:
    with pytest.raises(PerlError, match=problem) as raised:
        connect(url, {})
    assert "word" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"speed": 1}, "speed: a server takes timeout, retries, batch_size, token_env"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0 and at most 86,400, not 0"),
        ({"timeout": math.inf}, "timeout must be a number of seconds above 0 and at most 86,400, not inf"),
        ({"retries": -1}, "retries must be a number from 0, not -1"),
        ({"batch_size": 2.5}, "batch_size must be a number above 0, not 2.5"),
        ({"token_env": 3}, "token_env must be the name of an environment variable, not 3"),
        ({"token_env": "NO_SUCH_JUDGE"}, "token_env: the environment variable NO_SUCH_JUDGE is not set"),
    ],
)
def test_bad_keyword_arguments_are_refused(server: Server, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(PerlError, match=f"^--reward-kwargs {problem}"):
        connect(server.url, given)


def test_a_token_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "abc123abc123")
    reward = connect(server.url, {"token_env": "JUDGE_TOKEN"})
    reward(prompts=["a"], completions=["b"])
    assert server.headers[0]["Authorization"] == "Bearer abc123abc123"
    assert "abc123" not in repr(reward)


@pytest.mark.slow
def test_rl_and_eval_ask_a_server(server: Server, perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    server.answers = [lambda asked: (200, [sum(map(ord, str(each))) % 101 for each in asked["completions"]])]
    few = "--max-steps 2 --per-device-train-batch-size 4 --gradient-accumulation-steps 1 --num-generations 2"
    lengths = "--max-completion-length 4 --max-length 128 --output run"
    out = perl(
        "rl", "--model", llama, "--data", rows["prompts"], "--reward", server.url, *few.split(), *lengths.split()
    )
    assert f"reward: the server {server.url}" in out.output
    assert read_record(Path("run")).model["rewards"] == {server.url: ""}
    more = ("--reward", server.url, "--max-samples", "4", "--max-completion-length", "4", "--output", "eval")
    perl("eval", "--model", "run", "--data", rows["prompts"], *more)
    assert read_record(Path("eval")).status == "finished"


def test_a_function_has_the_defaults_that_the_docs_give() -> None:
    reward = HttpReward("http://x")
    assert (reward.timeout, reward.retries, reward.batch_size) == (60.0, 5, 32)
