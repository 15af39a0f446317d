"""The question and its answers: asked once, as messages if one of them is, and answers that are missing."""

from pathlib import Path
from typing import Any

import pytest
from row_samples import Raw, agent, converted, lines, said, user

from perlcli.data import Demonstration, Preference, Prompt, load
from perlcli.errors import PerlError

ASK, GOOD, BAD = user("2+2?"), agent("4"), agent("5")
SYSTEM = said("system", "Be brief.")
EARLIER = [*user("hi"), *agent("hello")]
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
KEPT = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("prompt", "start", "asked"),
    [
        (ASK, ASK, ASK),
        ("2+2?", ASK, ASK),
        ([SYSTEM, *ASK], ASK, [SYSTEM, *ASK]),
        (ASK, [SYSTEM, *ASK], [SYSTEM, *ASK]),
        ([*EARLIER, *ASK], [*EARLIER, *ASK], [*EARLIER, *ASK]),
        ([*EARLIER, *ASK], ASK, [*EARLIER, *ASK]),
        (HH, HH, [*EARLIER, *ASK]),
    ],
)
def test_a_prompt_that_answers_repeat_is_asked_once(prompt: Any, start: Any, asked: Any) -> None:
    good, bad = (start + " 4", start + " 5") if isinstance(start, str) else ([*start, *GOOD], [*start, *BAD])
    pair = {"prompt": prompt, "chosen": good, "rejected": bad}
    assert converted(pair, use="reward").rows == [Preference(asked, GOOD, BAD)]
    if not isinstance(start, str):
        assert converted({"prompt": prompt, "completion": good}, use="sft").rows == [Demonstration(asked, GOOD)]


def test_a_later_turn_may_say_what_the_prompt_says() -> None:
    more = [*GOOD, *ASK, *GOOD]
    assert converted({"prompt": ASK, "completion": more}, use="sft").rows == [Demonstration(ASK, more)]


def test_a_prompt_that_only_one_answer_repeats_is_refused() -> None:
    with pytest.raises(PerlError, match="the answers do not start with the same turns of the prompt"):
        converted({"prompt": ASK, "chosen": [*ASK, *GOOD], "rejected": BAD}, use="reward")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "answers"),
    [
        ("2+2?", "2+2? It is 4.", "2+2? It is 5.", (" It is 4.", " It is 5.")),
        ("What is 2+2", "What is 2+2: 4", "What is 2+2: 5", (": 4", ": 5")),
        ("What is 2+2", "What is 2+25", "What is 2+24", None),
        ("Hi", "Hi there", "Hi you", None),
        ("What is 2+2?", "What is 2+2? 4", "5", None),
    ],
)
def test_a_text_that_both_answers_repeat_is_asked_once(prompt: str, chosen: str, rejected: str, answers: Any) -> None:
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert converted(pair, use="reward").rows == [Preference(prompt, *(answers or (chosen, rejected)))]


@pytest.mark.parametrize(
    ("raw", "use", "row"),
    [
        ({"prompt": HH, "chosen": " 4", "rejected": " 5"}, "reward", Preference([*EARLIER, *ASK], GOOD, BAD)),
        ({"prompt": HH, "completion": " 4"}, "sft", Demonstration([*EARLIER, *ASK], GOOD)),
        ({"prompt": HH}, "rl", Prompt([*EARLIER, *ASK])),
    ],
)
def test_a_prompt_in_the_form_of_anthropic_hh_becomes_turns(raw: Raw, use: str, row: object) -> None:
    assert converted(raw, use=use).rows == [row]
    plain = converted(raw, use=use, chat=False).rows[0].prompt
    assert plain == HH


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": ASK, "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD, "rejected": "5"},
    ],
)
def test_text_with_messages_is_a_turn(raw: Raw) -> None:
    assert converted(raw, use="reward").rows == [Preference(ASK, GOOD, BAD)]
    demonstration = {"prompt": raw["prompt"], "completion": raw["chosen"]}
    assert converted(demonstration, use="sft").rows == [Demonstration(ASK, GOOD)]


@pytest.mark.parametrize("name", ["completion", "response", "answer"])
def test_the_answer_to_messages_may_have_its_own_column(name: str) -> None:
    assert converted({"messages": ASK, name: "4"}, use="sft").rows == [Demonstration(ASK, GOOD)]


@pytest.mark.parametrize("empty", [None, float("nan")])
@pytest.mark.parametrize(
    ("name", "use", "reason"),
    [
        ("chosen", "reward", "with an empty completion"),
        ("chosen", "sft", "with an empty completion"),
        ("rejected", "reward", "without another answer to compare"),
    ],
)
def test_a_missing_answer_leaves_its_row_out(name: str, use: str, reason: str, empty: Any) -> None:
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    done = converted(pair, {**pair, name: empty}, use=use)
    assert (len(done.rows), done.report.dropped) == (1, {reason: [2]})


def test_a_missing_completion_leaves_its_row_out() -> None:
    rows = [{"instruction": "2+2?", "output": "4"}, {"instruction": "3+3?", "output": None}]
    assert converted(*rows, use="sft").report.dropped == {"with an empty completion": [2]}
    assert len(converted(*rows, use="rl").rows) == 2


@pytest.mark.parametrize(("good", "bad"), [("4", "4 "), (GOOD, agent("4\n"))])
def test_answers_that_differ_only_in_white_space_around_them_are_equal(good: Any, bad: Any) -> None:
    pair = {"prompt": "2+2?", "chosen": good, "rejected": bad}
    assert converted(pair, use="reward").report.dropped == {"with equal answers": [1]}


@pytest.mark.parametrize("system", ["Be brief.", None])
def test_rows_of_one_prompt_share_their_system_prompt_and_options(system: Any, tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "system": system, "chat_template_kwargs": KEPT}
    other = {**row, "system": "Be kind."}
    rows = [{**row, "completion": "4", "score": 0.9}, {**row, "completion": "5", "score": 0.1}]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows, {**other, "completion": "6", "score": 0.2}))
    prompt = [said("system", system), *ASK] if system else ASK
    done = load(str(tmp_path / "a.jsonl"), "reward")
    assert done.rows == [Preference(prompt, GOOD, BAD, template=KEPT)]
    assert done.report.unused == ()
    assert done.report.dropped == {"without another answer to compare": [3]}


def test_an_answer_without_a_score_is_left_out_by_itself(tmp_path: Path) -> None:
    scores = {"4": 0.9, "5": 0.1, "6": None}
    rows = [{"prompt": "2+2?", "completion": answer, "score": score} for answer, score in scores.items()]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    done = load(str(tmp_path / "a.jsonl"), "reward")
    assert (done.rows, done.report.dropped) == ([Preference(ASK, GOOD, BAD)], {"without a label": [1]})
    assert load(str(tmp_path / "a.jsonl"), "rl").report.kept == 1
