"""Readers of datasets, trainers' files and labelling tools: the question, the order of the answers, and what is left
out."""

import json
from typing import Any

import pytest
from row_samples import PAIR, THUMB, Raw, agent, converted, said, user

from perlcli.data import Demonstration, Preference, Prompt, Thumb
from perlcli.data.examples import EXAMPLES, joined
from perlcli.data.formats import NAMES, detect
from perlcli.errors import PerlError

SYSTEM = said("system", "Be brief.")
ASK, GOOD, BAD = user("2+2?"), agent("4"), agent("5")
ADD = {"name": "add"}
STEPS = {"good": {"value": "yes"}}, {"good": {"value": "no"}}
RANKS = [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}]
TIED = {"with tied scores": [1]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("hh", "summarize-from-feedback", "tldr")])
def test_the_examples_of_all_formats_ask_the_question(name: str) -> None:
    known = NAMES[name]
    for use in known.uses:
        done = converted(joined(known), use=use)
        assert done.report.format == name
        for row in done.rows:
            text = str(row.prompt if use != "sft" or row.prompt is not None else row.completion)  # type: ignore[union-attr]
            asked = ("2+2", "latte", "Open Meet", "hi")
            assert any(part in text for part in asked)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("hh", "summarize-from-feedback")])
def test_the_better_answer_of_every_example_is_the_chosen_one(name: str) -> None:
    known = NAMES[name]
    for row in converted(joined(known), use="reward").rows if "reward" in known.uses else []:
        if isinstance(row, Preference):
            assert ("4" in str(row.chosen), "4" in str(row.rejected)) == (True, False)


@pytest.mark.parametrize(
    ("raw", "use", "row"),
    [
        # LLaMA-Factory
        (
            {"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5", "system": "Be brief."},
            "reward",
            Preference([SYSTEM, *user("Add.\n\n2+2")], GOOD, BAD),
        ),
        (
            {"instruction": "2+2?", "output": "4", "system": "Be brief.", "history": [["hi", "hello"]]},
            "sft",
            Demonstration([SYSTEM, *user("hi"), *agent("hello"), *ASK], GOOD),
        ),
        ({"instruction": "2+2?", "input": "", "output": "5", "kto_tag": False}, "reward", Thumb(ASK, BAD, False)),
        ({"instruction": "2+2?", "input": "", "output": "5", "kto_tag": False}, "sft", None),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "5"}], "kto_tag": False},
            "sft",
            None,
        ),
        ({"messages": [*ASK, *GOOD], "kto_tag": True, "system": "Be brief."}, "rl", Prompt([SYSTEM, *ASK])),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2+2?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "4"},
                ],
                "tools": '[{"name": "add"}]',
            },
            "sft",
            Demonstration(
                None,
                [*ASK, {**said("assistant", ""), "tool_calls": [CALL]}, said("tool", "4"), *GOOD],
                {"tools": [{"name": "add"}]},
            ),
        ),
        # axolotl and OpenAI
        ({"system": "Be brief.", "input": "2+2?", "chosen": "4", "rejected": "5"}, "rl", Prompt([SYSTEM, *ASK])),
        (
            {"system": "Be brief.", "prompt": "2+2?", "chosen": "4", "rejected": "5"},
            "reward",
            Preference([SYSTEM, *ASK], GOOD, BAD),
        ),
        (
            {"messages": [SYSTEM, *ASK], "chosen": GOOD[0], "rejected": BAD[0], "tools": [{"name": "add"}]},
            "reward",
            Preference([SYSTEM, *ASK], GOOD, BAD, template={"tools": [{"name": "add"}]}),
        ),
        (
            {
                "input": {"messages": ASK, "tools": [{"name": "add"}]},
                "preferred_output": GOOD,
                "non_preferred_output": BAD,
            },
            "reward",
            Preference(ASK, GOOD, BAD, template={"tools": [ADD]}),
        ),
        (
            {"messages": [*ASK, {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 2}'}}]},
            "sft",
            Demonstration(None, [*ASK, {**said("assistant", ""), "content": None, "tool_calls": [CALL]}]),
        ),
        (
            {"messages": [*ASK, {**BAD[0], "weight": 0}, *ASK, {**GOOD[0], "weight": 1, "name": "a", "train": True}]},
            "sft",
            Demonstration(None, [*ASK, {**BAD[0], "weight": 0}, *ASK, {**GOOD[0], "name": "a"}]),
        ),
        ({**PAIR, "margin": "2.5"}, "reward", Preference("a", "b", "c", 2.5)),
        (
            {"prompt": ASK, "completion": GOOD, "chat_template_kwargs": {"enable_thinking": False, "x": None}},
            "rl",
            Prompt(ASK, {"chat_template_kwargs": {"enable_thinking": False, "x": None}}, {"enable_thinking": False}),
        ),
        # datasets
        (
            {"question": "2+2?", "response_A": "5", "response_B": "4", "label": "B>A"},
            "reward",
            Preference(ASK, GOOD, BAD),
        ),
        (
            {"prompt": "2+2?", "response_0": "5", "response_1": "4", "better_response_id": 1},
            "reward",
            Preference(ASK, GOOD, BAD),
        ),
        (
            {"context": ASK, "response1": "5", "response2": "4", "overall_preference": 3},
            "reward",
            Preference(ASK, GOOD, BAD),
        ),
        (
            {"conversation_a": [*ASK, *BAD], "conversation_b": [*ASK, *GOOD], "winner": "model_b"},
            "reward",
            Preference(ASK, GOOD, BAD),
        ),
        (
            {"prompt": "first\n<extra_id_1>Assistant\nyes\n<extra_id_1>User\n2+2?", "response": "4", "helpfulness": 3},
            "sft",
            Demonstration([*user("first"), *agent("yes"), *ASK], GOOD),
        ),
        # labelling tools
        (
            {
                "fields": {"prompt": "2+2?", "response": "4"},
                "responses": [
                    {"values": {"good": {"value": "yes"}}},
                    {"values": {"good": {"value": "no"}}, "status": "draft"},
                ],
            },
            "reward",
            Thumb(ASK, GOOD, True),
        ),
        (
            {
                "fields": {"prompt": "2+2?", "a": None, "response-1": "5", "response-2": "4"},
                "responses": {
                    "q": [{"value": [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}]}]
                },
            },
            "reward",
            Preference(ASK, GOOD, BAD),
        ),
        (
            {
                "data": {"prompt": "2+2?", "answer": "4"},
                "annotations": [{"result": [{"from_name": "q", "value": {"choices": ["👍🏽"]}}]}],
            },
            "reward",
            Thumb(ASK, GOOD, True),
        ),
    ],
)
def test_a_row_is_read_with_its_question_and_its_verdict(raw: Raw, use: str, row: Any) -> None:
    done = converted(raw, use=use)
    rows = [Prompt(found.prompt, {}, found.template) if isinstance(found, Prompt) else found for found in done.rows]
    wanted = Prompt(row.prompt, {}, row.template) if isinstance(row, Prompt) else row
    assert rows == ([] if row is None else [wanted])


@pytest.mark.parametrize(
    "raw",
    [
        {**PAIR, "score_chosen": 8.5, "score_rejected": 8.5},
        {**PAIR, "chosen_score": None, "rejected_score": None, "status": "tie"},
        {"question": "q", "response_A": "5", "response_B": "4", "label": "A=B"},
        {"context": ASK, "response1": "5", "response2": "4", "overall_preference": 0},
        {"conversation_a": [*ASK, *BAD], "conversation_b": [*ASK, *GOOD], "winner": "tie (bothbad)"},
        {"question": {"full_text": "q"}, "answer_0": "4", "answer_1": "5", "score_0": 0.0, "score_1": 0.0},
        {
            "data": {"prompt": "q", "answer1": "4", "answer2": "5"},
            "annotations": [
                {"result": [{"from_name": "q", "value": {"selected": side}}]} for side in ("left", "right")
            ],
        },
        {
            "prompt": '["q"]',
            "response_a": '["4"]',
            "response_b": '["5"]',
            "winner_model_a": 0,
            "winner_model_b": 0,
            "winner_tie": 1,
        },
    ],
)
def test_ties_are_left_out_and_counted(raw: Raw) -> None:
    done = converted(raw, use="reward")
    assert (done.rows, done.report.dropped) == ([], TIED)
    assert len(converted(raw, use="rl").rows) == 1


RANKED: Raw = {
    "instruction": "2+2?",
    "completions": [
        {"response": text, "fine-grained_score": score, "annotations": {"honesty": {"Rating": rating}}}
        for text, score, rating in (("4", 5.0, "1"), ("5", 1.0, "5"), ("6", 1.0, "N/A"))
    ],
}


def test_a_ranking_becomes_its_pairs_without_ties() -> None:
    done = converted(RANKED, use="reward")
    assert done.rows == [Preference(ASK, GOOD, BAD), Preference(ASK, GOOD, agent("6"))]
    assert (
        done.report.line()
        == "x: ultrafeedback, 3 rows read from 1 source row, 2 kept; dropped 1 with tied scores (row 1)"
    )
    assert converted(RANKED, use="reward", pairs="best-worst").rows == [Preference(ASK, GOOD, agent("6"))]
    assert converted(RANKED, use="reward", score_field="honesty").rows == [Preference(ASK, BAD, GOOD)]
    assert converted(RANKED, use="rl").rows == [Prompt(ASK, RANKED)]


def test_sft_learns_the_best_answer_of_a_ranking_and_counts_the_others() -> None:
    done = converted(RANKED, use="sft")
    assert done.rows == [Demonstration(ASK, GOOD)]
    assert done.report.dropped == {"with a better answer to the same prompt": [1, 1]}


def test_a_threshold_makes_thumbs_of_scored_answers() -> None:
    done = converted(RANKED, use="reward", label_threshold=5)
    assert done.rows == [Thumb(ASK, GOOD, True), Thumb(ASK, BAD, False), Thumb(ASK, agent("6"), False)]
    assert converted(RANKED, use="sft", label_threshold=1).report.kept == 3


def test_lists_of_chosen_and_rejected_answers_have_no_ties() -> None:
    done = converted({"prompt": "2+2?", "chosen": ["4", "four"], "rejected": ["5"]}, use="reward")
    assert done.rows == [Preference(ASK, GOOD, BAD), Preference(ASK, agent("four"), BAD)]
    assert not done.report.dropped


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "image_url", "image_url": "x"}], "a part of type image_url: only text can be used"),
        ([{"type": "input_audio"}], "a part of type input_audio: only text can be used"),
        ([{"type": "refusal", "refusal": "x"}], "a part that is not text"),
        ([], "content is not text: []"),
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(content: Any, told: str) -> None:
    with pytest.raises(PerlError, match="x, row 1: messages has a message") as caught:
        converted({"messages": [{"role": "user", "content": content}]}, use="sft")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": json.dumps([*ASK, *GOOD])},
        {"conversations": json.dumps([{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]), "id": 1},
    ],
)
def test_a_table_has_conversations_as_json(raw: Raw) -> None:
    assert converted(raw, use="sft").rows == [Demonstration(None, [*ASK, *GOOD])]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    done = converted({"messages": [{"role": "user", "content": parts}, *GOOD]}, use="sft")
    assert done.rows == [Demonstration(None, [*ASK, *GOOD])]


def test_pairs_that_differ_only_in_a_call_are_not_equal() -> None:
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": n}}]} for n in (1, 2)
    ]
    done = converted({"prompt": ASK, "chosen": calls[:1], "rejected": calls[1:]}, use="reward")
    assert (done.report.kept, done.report.dropped) == (1, {})
    assert done.rows[0].chosen[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}  # type: ignore[union-attr,index]
    thought = [{**GOOD[0], "reasoning_content": text} for text in ("a", "b")]
    assert converted({"prompt": ASK, "chosen": thought[:1], "rejected": thought[1:]}, use="reward").report.kept == 1


def test_empty_turns_are_not_learned() -> None:
    done = converted({"messages": [*ASK, *agent(" "), *ASK, *GOOD]}, {"messages": [*ASK, *GOOD]}, use="sft")
    assert (done.numbers, done.report.dropped) == ([2], {"with an empty completion": [1]})
    skipped = {"messages": [*ASK, {**said("assistant", ""), "weight": 0}, *ASK, *GOOD]}
    assert converted(skipped, use="sft").report.kept == 1


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({**THUMB, "system": 5}, "system must be text, not 5"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history must be a list of [question, answer] pairs"),
        ({"messages": [*ASK, {**GOOD[0], "weight": 2}]}, "a message's weight must be 0 or 1, not 2"),
        ({"messages": [*ASK, {**GOOD[0], "tool_calls": [{}]}]}, "a tool call that has no name"),
        ({"messages": [*ASK, *GOOD], "tools": [1]}, "tools must be a list of objects, not [1]"),
        ({"messages": [SYSTEM, *GOOD], "system": "Other."}, "are two different system prompts"),
        ({"prompt": "q", "answers": [{"answer": "4", "rank": "x"}]}, "rank must be a number, not 'x'"),
        ({**RANKED, "completions": [1]}, "completions must be a list of objects"),
        (
            {"fields": {"prompt": "q", "response": "4", "context": "c"}, "responses": {}},
            "fields has context, of which it is unknown whether",
        ),
        (
            {
                "fields": {"prompt": "q", "response-1": "4", "response-2": "5"},
                "responses": {"a": [{"value": "x"}], "b": [{"value": "y"}]},
            },
            "several questions were answered: a, b; choose one with --score-field",
        ),
        (
            {"fields": {"prompt": "q", "response-1": "4", "response-2": "5"}, "responses": {"a": [{"value": "x"}]}},
            "the verdict must be one of response-1, response-2, not 'x'",
        ),
        ({"messages": [*ASK], "kto_tag": True}, "the conversation must end with the turn of the assistant"),
    ],
)
def test_what_can_not_be_read_is_the_error_of_its_row(raw: Raw, told: str) -> None:
    known = detect(raw)
    with pytest.raises(PerlError, match=r"x, row 1: ") as caught:
        converted(raw, use="reward" if known and "reward" in known.uses else "sft")
    assert told in str(caught.value)
