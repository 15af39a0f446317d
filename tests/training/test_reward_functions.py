"""Reward functions: found by any name, called by TRL's contract, and kept from changing what others see."""

import asyncio
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from transformers import TrainerState

from perlcli.data import Prompt, Renderer, with_all_columns
from perlcli.errors import PerlError
from perlcli.run.record import read_record
from perlcli.training import reward_names
from perlcli.training.reward_errors import OnError
from perlcli.training.reward_functions import Calling, FunctionReward, find, keyword_arguments
from perlcli.training.rewards import Weighted

CHAT = [{"role": "user", "content": "a large latte"}]
TWO = ([Prompt("a"), Prompt("b")], [[5], [6]])
Perl = Callable[..., Any]


def called(function: Any, render: Renderer, *given: Any) -> list[float | None]:
    return FunctionReward(function, "m:f", render)(*given or TWO)


# Found


def test_a_function_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "helper_of_brief.py").write_text("limit = 3")
    (folder / "brief-1.py").write_text("import helper_of_brief as h\ndef brief(completions): return [h.limit]")
    assert find(f"{folder}/brief-1.py:brief", {})(completions=[]) == [3]
    monkeypatch.chdir(folder)
    assert find("./brief-1.py:brief", {})(completions=[]) == [3]
    with pytest.raises(PerlError, match=r"^--reward gone\.py:brief: there is no file gone\.py"):
        find("gone.py:brief", {})
    with pytest.raises(PerlError, match=r"brief-1\.py has no function breif\nHint: Did you mean brief\?"):
        find("brief-1.py:breif", {})


@pytest.mark.parametrize("attribute", ["obj", "Scorer.static", "part", "quick"])
def test_any_callable_is_found(attribute: str, module: Callable[[str], str]) -> None:
    name = module(
        "import functools\n"
        "class Scorer:\n"
        "    def __call__(self, completions, **_): return [1.0] * len(completions)\n"
        "    @staticmethod\n"
        "    def static(completions, **_): return [1.0] * len(completions)\n"
        "obj = Scorer()\n"
        "def scaled(completions, scale, **_): return [scale] * len(completions)\n"
        "part = functools.partial(scaled, scale=1.0)\n"
        "quick = lambda completions, **_: [1.0] * len(completions)\n"
    )
    assert find(f"{name}:{attribute}", {})(completions=["a", "b"]) == [1.0, 1.0]


def test_functions_of_trl_work(render: Renderer) -> None:
    rows, written = [Prompt(CHAT)], [render.tokenizer("tall")["input_ids"]]
    assert called(find("trl.rewards:think_format_reward", {}), render, rows, written) == [0.0]
    overlong = find("trl.rewards:get_soft_overlong_punishment", {"max_completion_len": 2, "soft_punish_cache": 1})
    assert called(overlong, render, rows, [[5, 6, 7, 8]]) == [-1.0]
    assert called(find("trl.rewards:get_repetition_penalty_reward", {}), render, rows, written) == [0.0]


def test_what_makes_a_function_says_what_it_needs() -> None:
    with pytest.raises(PerlError) as raised:
        find("trl.rewards:get_soft_overlong_punishment", {})
    assert str(raised.value).splitlines() == [
        "--reward trl.rewards:get_soft_overlong_punishment makes a reward function: missing a required argument: "
        "'max_completion_len'",
        "Hint: it is get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int); give it what it "
        """needs: --reward-kwargs '{"max_completion_len": 1, "soft_punish_cache": 1}'""",
    ]
    with pytest.raises(PerlError, match="got an unexpected keyword argument 'limit'"):
        find("trl.rewards:get_repetition_penalty_reward", {"limit": 1})


def test_what_is_no_reward_function(module: Callable[[str], str]) -> None:
    name = module("def none(): return 3\ndef fails(): raise ValueError('no key')\nclass Empty: pass")
    with pytest.raises(
        PerlError, match=f"^--reward {name}:none is not a reward function: it takes no completions, and g"
    ):
        find(f"{name}:none", {})
    with pytest.raises(PerlError, match=f"^--reward {name}:fails failed: ValueError: no key"):
        find(f"{name}:fails", {})
    with pytest.raises(PerlError, match=f"^--reward {name}:Empty is not a reward function"):
        find(f"{name}:Empty", {})


def test_keyword_arguments_come_before_columns(module: Callable[[str], str], render: Renderer) -> None:
    name = module("def f(completions, limit, **_): return limit if isinstance(limit, list) else [limit] * 2")
    rows = [Prompt("a", {"limit": 1}), Prompt("b", {"limit": 2})]
    assert called(find(f"{name}:f", {"limit": 7}), render, rows, [[5], [6]]) == [7.0, 7.0]
    assert called(find(f"{name}:f", {}), render, rows, [[5], [6]]) == [1.0, 2.0]
    plain = module("def g(completions): return [0.0]")
    with pytest.raises(PerlError, match=r"^--reward-kwargs: --reward .*:g: got an unexpected keyword argument 'limit'"):
        find(f"{plain}:g", {"limit": 7})


def test_keyword_arguments_belong_to_a_reward() -> None:
    def given(*texts: str, names: tuple[str, ...] = ("m:f", "folder")) -> list[dict[str, Any]]:
        return keyword_arguments(texts, names, reward_names.names_function)

    assert given() == [{}, {}]
    assert given('{"a": 1}') == [{"a": 1}, {}]
    assert given("{a: 1, b: [x]}", names=("m:f",)) == [{"a": 1, "b": ["x"]}]
    assert given("{a: 1}", "{}") == [{"a": 1}, {}]
    with pytest.raises(PerlError, match=r"^--reward-kwargs must be given once for each --reward: 2 times, not 1"):
        given("{a: 1}", names=("m:f", "m:g"))
    with pytest.raises(PerlError, match=r"^--reward-kwargs must be a JSON object, not 'limit=3'"):
        given("limit=3")
    with pytest.raises(PerlError, match=r"--reward folder is a model, which takes no arguments"):
        given("{}", "{a: 1}")


# Called


def test_function_is_called_as_trl_calls_it(render: Renderer) -> None:
    calls = []

    def reward(**given: Any) -> list[Any]:
        calls.append(given)
        return [1, True, None]

    rows = [Prompt(CHAT, {"order": "x", "n": 1}), Prompt("plain", {"order": "y", "n": 2}), Prompt(CHAT, {"order": "z"})]
    ends = [*render.tokenizer("tall")["input_ids"], render.eos_ids[0]]
    written = [ends, render.tokenizer("small")["input_ids"], render.tokenizer("cut")["input_ids"]]
    calling = Calling(TrainerState(global_step=3))
    assert FunctionReward(reward, "m:f", render)(rows, written, calling) == [1.0, 1.0, None]
    (given,) = calls
    answers = [[{"role": "assistant", "content": "tall"}], "small", [{"role": "assistant", "content": "cut"}]]
    assert given == {
        "prompts": [CHAT, "plain", CHAT],
        "completions": answers,
        "completion_ids": written,
        "order": ["x", "y", "z"],
        "n": [1, 2, None],
        "trainer_state": calling.trainer_state,
        "log_extra": ANY,
        "log_metric": ANY,
    }
    assert given["trainer_state"].global_step == 3


def test_a_column_may_have_any_name(render: Renderer) -> None:
    names = ("self", "function", "name", "rows", "prompts", "completions", "class", "two words", "trainer_state")
    rows = [Prompt("a", dict.fromkeys(names, 5))]
    seen: dict[str, Any] = {}
    assert called(lambda **given: seen.update(given) or [0.0], render, rows, [[5]]) == [0.0]
    assert seen["prompts"] == ["a"] and seen["self"] == [5] and seen["two words"] == [5]
    assert isinstance(seen["trainer_state"], TrainerState)


def test_a_function_that_takes_few_names_gets_those(render: Renderer) -> None:
    rows = [Prompt("a", {"order": 2}), Prompt("b", {"order": 3})]
    assert called(lambda completions, order: order, render, rows, [[5], [6]]) == [2.0, 3.0]
    with pytest.raises(PerlError, match=r"^The reward function m:f needs the column answer: the data has order"):
        called(lambda completions, answer: answer, render, rows, [[5], [6]])
    with pytest.raises(PerlError, match=r"needs the column answer: the data has no column besides the prompt"):
        called(lambda completions, answer: answer, render)


def test_async_functions_wait_at_the_same_time(render: Renderer) -> None:
    here: list[str] = []
    both = asyncio.Event()

    async def one(completions: list[str], **_: Any) -> list[float]:
        here.append("one")
        await asyncio.wait_for(both.wait(), 5)
        return [1.0] * len(completions)

    class Two:
        async def __call__(self, completions: list[str], **_: Any) -> list[float]:
            here.append("two")
            both.set()
            return [2.0] * len(completions)

    def plain(completions: list[str], **_: Any) -> list[float]:
        asyncio.run(asyncio.sleep(0))  # a function may run a loop of its own
        return [4.0] * len(completions)

    given = {"one": one, "plain": plain, "two": functools.partial(Two())}
    rewards = {name: FunctionReward(function, name, render) for name, function in given.items()}
    scored = Weighted(rewards, (1.0, 10.0, 100.0))(*TWO)
    assert scored.total == [241.0, 241.0]
    assert here == ["one", "two"]
    assert FunctionReward(Two(), "two", render)(*TWO) == [2.0, 2.0]


def test_one_event_loop_serves_all_calls(render: Renderer) -> None:
    loops = []

    async def reward(completions: list[str], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    called(reward, render)
    called(reward, render)
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_functions_see_copies(render: Renderer) -> None:
    """What a function does to its arguments, the next reward and the next step must not see."""

    def spoils(prompts: Any, completions: Any, completion_ids: Any, meta: Any, **_: Any) -> list[float]:
        prompts[0].append({"role": "assistant", "content": "x"})
        completions[0][0]["content"] = "x"
        completion_ids[0].append(9)
        meta[0]["calls"] = 1
        return [0.0]

    seen: list[Any] = []
    rows, written = [Prompt([dict(CHAT[0])], {"meta": {}})], [render.tokenizer("tall")["input_ids"]]
    before = list(written[0])
    looks = FunctionReward(lambda **given: seen.append(given) or [0.0], "looks", render)
    spoiler = FunctionReward(spoils, "spoils", render)
    for _ in range(2):
        Weighted({"spoils": spoiler, "looks": looks}, (1.0, 1.0))(rows, written)
    for given in seen:
        assert given["prompts"] == [CHAT] and given["meta"] == [{}] and given["completion_ids"] == [before]
        assert given["completions"] == [[{"role": "assistant", "content": "tall"}]]
    assert rows == [Prompt(CHAT, {"meta": {}})] and written == [before]


@pytest.mark.parametrize(
    ("gives", "problem"),
    [
        (lambda **_: [1.0], "returned 1 rewards for 2 completions"),
        (lambda **_: 1.0, "returned 1.0, not a list with a number for each completion"),
        (lambda **_: None, "returned None, not a list"),
        (lambda **_: {"a": 1.0, "b": 1.0}, "returned .*, not a list"),
        (lambda **_: ["good", "bad"], "returned something that is not a number: ValueError: could not convert"),
        (lambda **_: [{"score": 1.0}] * 2, "returned something that is not a number: TypeError"),
        (lambda **columns: columns["missing"], "failed: KeyError: 'missing'"),
        (lambda **_: itertools.repeat(1.0), "returned more than 2 rewards for 2 completions"),
        (lambda **_: (1 / each for each in range(2)), "failed: ZeroDivisionError: division by zero"),
        (lambda **_: b"ab", "returned b'ab', not a list"),
        (lambda **_: [Odd()] * 2, "returned something that is not a number: KeyError: 'no number'"),
        (lambda **_: Odd(), "returned a Odd, not a list"),
        (lambda **_: leave(GeneratorExit()), "failed: GeneratorExit"),
        (lambda **_: leave(type("Own", (BaseException,), {})("gone")), "failed: Own: gone"),
        (lambda **_: leave(OddError()), "failed: OddError"),
    ],
)
def test_function_that_gives_no_rewards_is_an_error(gives: Callable[..., Any], problem: str, render: Renderer) -> None:
    with pytest.raises(PerlError, match=f"^The reward function m:f {problem}"):
        called(gives, render)


class Odd:
    def __float__(self) -> float:
        raise KeyError("no number")

    def __repr__(self) -> str:
        raise ValueError("no text")


class OddError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def leave(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a.py", "must be file.py:function or module:function\nHint: --reward a.py:NAME"),
        ("a.py:", "must be file.py:function or module:function"),
        (":f", "must be file.py:function or module:function"),
        ("a.py:f:g", "must be file.py:function or module:function"),
        ("module:", "must be file.py:function or module:function"),
        ("ftp://a/score", "must begin with http:// or https://"),
    ],
)
def test_half_a_name_is_an_error(name: str, problem: str) -> None:
    with pytest.raises(PerlError, match=f"^--reward {name} {problem}"):
        reward_names.check_given([name])


@pytest.mark.parametrize("name", ["run", "org/model", "./run", "/no/such:folder", "m:f", "a/b.py:f", "https://a/b"])
def test_names_of_models_functions_and_servers_are_accepted(name: str) -> None:
    reward_names.check_given([name])


def test_a_reward_without_an_opinion_is_left_out_of_the_sum(render: Renderer) -> None:
    one = FunctionReward(lambda **_: [None, None], "one", render)
    two = FunctionReward(lambda **_: [3.0, None], "two", render)
    scored = Weighted({"one": one, "two": two}, (1.0, 2.0), on_error=OnError("skip"))(*TWO)
    assert scored.total[0] == 6.0 and math.isnan(scored.total[1])
    assert scored.parts == {"one": [None, None], "two": [3.0, None]}


def test_columns_of_some_rows_are_columns_of_all() -> None:
    rows = [Prompt("a"), Prompt("b", {"answer": "4"}), Prompt("c", {"level": 1})]
    assert [row.extra for row in with_all_columns(rows)] == [
        {"answer": None, "level": None},
        {"answer": "4", "level": None},
        {"answer": None, "level": 1},
    ]


@pytest.mark.slow
def test_a_run_passes_all_of_it(perl: Perl, llama: Path, module: Callable[[str], str]) -> None:
    """Columns that few rows have, the state, metrics and extra columns, keyword arguments from a file."""
    name = module(
        "import json\n"
        "def reward(completions, answer, trainer_state, log_metric, log_extra, weight):\n"
        "    log_metric('answers', sum(each is not None for each in answer))\n"
        "    log_extra('length', [len(str(each)) for each in completions])\n"
        "    with open('steps.txt', 'a') as file: file.write(f'{trainer_state.global_step} ')\n"
        "    return [weight * (sum(map(ord, str(each))) % 101) for each in completions]\n"
    )
    rows = [{"prompt": f"order {number}", **({"answer": "4"} if number == 5 else {})} for number in range(6)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("run.yaml").write_text(f"reward: {name}:reward\nreward_kwargs: {{weight: 0.5}}\n")
    few = "--max-steps 2 --per-device-train-batch-size 4 --gradient-accumulation-steps 1 --num-generations 2"
    lengths = "--max-completion-length 4 --max-length 64 --output run"
    perl("rl", "--model", llama, "--data", "prompts.jsonl", "--config", "run.yaml", *few.split(), *lengths.split())
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(row["answers"] in (0, 2) for row in metrics)
    assert Path("steps.txt").read_text().split()[-2:] == ["0", "1"]
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert all(row["length"] > 0 for row in samples)
    assert read_record(Path("run")).settings["reward_kwargs"] == ['{"weight": 0.5}']
