"""The examples of docs/rewards.md and examples/http-reward do what they are there for."""

import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from perlcli.training import reward_functions

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.DOTALL)
Perl = Callable[..., Any]


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Writes an example into a file, and finds its function."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def go(number: int, name: str, **given: Any) -> Any:
        (tmp_path / f"example_{number}.py").write_text(EXAMPLES[number], encoding="utf-8")
        return reward_functions.find(f"{tmp_path}/example_{number}.py:{name}", given)

    return go


def test_an_answer_is_checked(find: Any) -> None:
    logged: dict[str, float] = {}
    completions = ["so it is 4", [{"role": "assistant", "content": "5 or 6.0"}], "no idea", "7"]
    found = find(0, "correct")(completions, answer=["4", "6", "1", None], log_metric=logged.__setitem__)
    assert found == [1.0, 1.0, 0.0, None]
    assert logged == {"correct": pytest.approx(2 / 3)}


def test_a_class_with_arguments(find: Any) -> None:
    assert find(1, "Brief", limit=2, weight=0.5)(completion_ids=[[1], [1, 2, 3, 4]]) == [0.0, -1.0]


def test_a_judge_is_asked(find: Any) -> None:
    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            reply = {"choices": [{"message": {"content": "7.5" if asked.endswith("good") else "a seven"}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        judge = find(2, "judge")
        judge.__globals__["URL"] = f"http://127.0.0.1:{server.server_port}/"
        completions = ["good", [{"role": "assistant", "content": "bad"}]]
        assert reward_functions.wait_for(judge(completions)) == [7.5, None]
        server.shutdown()


@pytest.fixture
def serve() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "http-reward" / "serve.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def test_a_served_reward_model_scores_completions(
    serve: Any, perl: Perl, llama: Path, reward_run: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are those of the run's own samples, and their mean is what `perl eval` reports."""
    server = serve.serve(str(reward_run), 0)
    server.RequestHandlerClass.log_message = lambda *_: None
    scores, given = serve.scores, []
    monkeypatch.setattr(serve, "scores", lambda *words: given.append(scores(*words)) or given[-1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    few = ("--max-samples", "6", "--max-completion-length", "6", "--dtype", "float32", "--output", "served")
    perl("eval", "--model", llama, "--reward", url, "--data", rows["prompts"], *few)
    server.shutdown()
    server.server_close()
    metrics = json.loads(Path("served", "record.json").read_text())["metrics"]
    (served,) = given
    assert len(served) == metrics["prompts"] == 6
    assert metrics["mean_reward"] == pytest.approx(sum(served) / 6)


def test_a_served_reward_model_scores_as_its_run_did(serve: Any, reward_run: Path) -> None:
    model, tokenizer = serve.load(str(reward_run))
    for line in (reward_run / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", sample["chosen"], re.DOTALL)
        *prompt, completion = [{"role": role, "content": content} for role, content in turns]
        found = serve.scores(model, tokenizer, [prompt], [[completion]])
        assert found == [pytest.approx(sample["chosen_score"], abs=1e-4)]
