"""Rows of published datasets as they were published, as chats and as text."""

import json
from typing import Any

import pytest
from row_samples import HH, SHP, TASK, Raw, agent, converted, said, user

from perlcli.data import Demonstration, Preference, Prompt, Thumb

POST: Raw = {"subreddit": "relationships", "title": "Dogs", "post": "My dog ran."}


COMPARISON: Raw = {
    "info": {"id": "t3_1", **POST, "site": None, "article": None},
    "batch": "batch3.json",
    "summaries": [
        {"text": " Dog gone.", "policy": "sup1", "note": None},
        {"text": " A post.", "policy": "ref", "note": ""},
    ],
    "choice": 1,
    "worker": "w",
    "split": "train",
    "extra": {"confidence": None},
}


TLDR = "SUBREDDIT: r/relationships\n\nTITLE: Dogs\n\nPOST: My dog ran.\n\nTL;DR:"


STEP: Raw = {
    "episode_id": 27,
    "goal": "See the meetings",
    "instruction": "Open the Meet app",
    "history": [{"action_type": "wait"}],
    "action": {"action_type": "open_app", "app_name": "Meet", "x": None},
    "label": True,
}


STEP_PROMPT = 'goal: See the meetings\ninstruction: Open the Meet app\nhistory:\n1. {"action_type": "wait"}\naction:'


ACTION = '{"action_type": "open_app", "app_name": "Meet"}'


DIALOG: Raw = {
    "conversation_id": "dlg-1",
    "vertical": "Coffee",
    "scenario": "s",
    "instructions": None,
    "utterances": [
        {
            "index": 0,
            "speaker": "user",
            "text": "A Mocha please",
            "segments": [],
            "annotations": [
                {"name": "api_call", "value": "get_menu_items", "context": "api_call_0"},
                {"name": "request", "value": '{"query": "Mocha"}', "context": "api_call_0"},
                {"name": "api_response", "value": "get_menu_items", "context": "api_response_0"},
                {"name": "response", "value": '{"menu_items": []}', "context": "api_response_0"},
                {"name": "api_call", "value": "finish_order", "context": "api_call_1"},
            ],
        },
        {"index": 1, "speaker": "assistant", "text": "We have none.", "segments": [], "annotations": []},
    ],
}


@pytest.mark.parametrize(
    ("raw", "use", "name", "chat", "text"),
    [
        (
            SHP,
            "reward",
            "shp",
            Preference(user("How do I boil an egg?"), agent("Six minutes, then cold water."), agent("In a pan.")),
            Preference("POST: How do I boil an egg?\n\nRESPONSE:", " Six minutes, then cold water.", " In a pan."),
        ),
        (
            {**SHP, "labels": 1},
            "sft",
            "shp",
            Demonstration(user("How do I boil an egg?"), agent("In a pan.")),
            Demonstration("POST: How do I boil an egg?\n\nRESPONSE:", " In a pan."),
        ),
        (
            COMPARISON,
            "reward",
            "summarize-from-feedback",
            Preference(user(TLDR), agent("A post."), agent("Dog gone.")),
            Preference(TLDR, " A post.", " Dog gone."),
        ),
        (
            {**COMPARISON, "choice": 0, "info": {"post": None, "title": "t", "subreddit": None, "article": "News."}},
            "reward",
            "summarize-from-feedback",
            Preference(user("ARTICLE: News.\n\nTL;DR:"), agent("Dog gone."), agent("A post.")),
            Preference("ARTICLE: News.\n\nTL;DR:", " Dog gone.", " A post."),
        ),
        (
            {**POST, "summary": "Dog gone."},
            "sft",
            "tldr",
            Demonstration(user(TLDR), agent("Dog gone.")),
            Demonstration(TLDR, " Dog gone."),
        ),
        (POST, "rl", "tldr", Prompt(user(TLDR), POST), Prompt(TLDR, POST)),
        (
            STEP,
            "reward",
            "android-control",
            Thumb(user(STEP_PROMPT), agent(ACTION), True),
            Thumb(STEP_PROMPT, " " + ACTION, True),
        ),
        (
            {"instruction": "Tap Save", "screen": "Save | Cancel", "history": None, "action": "tap Save"},
            "sft",
            "android-control",
            Demonstration(user("instruction: Tap Save\nscreen: Save | Cancel\naction:"), agent("tap Save")),
            Demonstration("instruction: Tap Save\nscreen: Save | Cancel\naction:", " tap Save"),
        ),
        (
            {"instruction": "Add", "input": "1 and 2", "output": "3"},
            "sft",
            "alpaca",
            Demonstration(user("Add\n\n1 and 2"), agent("3")),
            Demonstration(
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request."
                "\n\n### Instruction:\nAdd\n\n### Input:\n1 and 2\n\n### Response:",
                "3",
            ),
        ),
        (
            {"instruction": "Say {hi}", "input": "", "output": "{hi}", "text": "…"},
            "sft",
            "alpaca",
            Demonstration(user("Say {hi}"), agent("{hi}")),
            Demonstration(
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\nSay {hi}\n\n### Response:",
                "{hi}",
            ),
        ),
        (
            {
                "id": "1",
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ],
            },
            "sft",
            "sharegpt",
            *[Demonstration(None, [said("system", "s"), *user("a"), *agent("b")])] * 2,
        ),
        (
            {"conversations": [*user("a"), *agent("b")]},
            "sft",
            "sharegpt",
            *[Demonstration(None, [*user("a"), *agent("b")])] * 2,
        ),
        (
            {
                "prompt": "a",
                "messages": [*user("a"), *agent("b")],
                "chosen": [*user("a"), *agent("b")],
                "rejected": [*user("a"), *agent("c")],
                "score_chosen": 9.0,
            },
            "reward",
            "pairs",
            *[Preference(user("a"), agent("b"), agent("c"))] * 2,
        ),
        ({"chosen": "The sky is green.", "rejected": "The sky is gray."}, "rl", "pairs", *[Prompt("The sky is")] * 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_published_row_is_read_as_a_chat_or_as_text(raw: Raw, use: str, name: str, chat: Any, text: Any) -> None:
    for has_template, row in ((True, chat), (False, text)):
        done = converted(raw, use=use, chat=has_template)
        assert done.report.format == name
        assert done.rows == [row]


def test_without_a_chat_template_hh_stays_text() -> None:
    prompt = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    assert converted(HH, use="reward", chat=False).rows == [Preference(prompt, " good", " bad")]


def test_hh_conversations_that_part_early_keep_their_own_turns() -> None:
    raw = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    }
    row = Preference(user("a"), [*agent("b"), *user("c"), *agent("d")], agent("e"))
    assert converted(raw, use="reward").rows == [row]
    text = Preference("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " e")
    assert converted(raw, use="reward", chat=False).rows == [text]


def test_without_a_chat_template_taskmaster_stays_text() -> None:
    turns = [{"role": "agent", "text": "Hello"}, {"role": "api", "response": {"é": 1}}]
    raw = {"context": json.dumps(turns), "generation": json.dumps({"role": "agent", "text": "Hi"}), "reward": 0}
    row = Thumb('agent: Hello\napi: {"é": 1}\nagent:', " Hi", False)
    assert converted(raw, use="reward", chat=False).rows == [row]


def test_taskmaster_turns_may_be_objects_already() -> None:
    raw = {key: json.loads(value) if isinstance(value, str) else value for key, value in TASK.items()}
    assert converted(raw, use="reward") == converted(TASK, use="reward")


def test_a_dialog_gives_every_action_of_the_agent_in_the_shape_of_the_reward_rows() -> None:
    call, answer = '{"get_menu_items": {"query": "Mocha"}}', 'api: {"get_menu_items": {"menu_items": []}}'
    start = "user: A Mocha please"
    first, second = f"{start}\nagent:", f"{start}\nagent: {call}\n{answer}\nagent:"
    third = f'{start}\nagent: {call}\n{answer}\nagent: {{"finish_order": {{}}}}\nagent:'
    done = converted({**DIALOG, "utterances": DIALOG["utterances"][:1]}, DIALOG, use="sft")
    expected = [
        Demonstration(user(first), agent(call)),
        Demonstration(user(second), agent('{"finish_order": {}}')),
        Demonstration(user(third), agent("We have none.")),
    ]
    assert done.report.format == "taskmaster-dialogs"
    assert done.rows == expected[:2] + expected
    assert done.numbers == [1, 1, 2, 2, 2]
    reward = {
        "context": json.dumps([{"role": "user", "text": "A Mocha please"}]),
        "reward": 1.0,
        "generation": json.dumps({"role": "agent", "api": {"get_menu_items": {"query": "Mocha"}}}),
    }
    assert converted(reward, use="sft").rows == expected[:1]


def test_the_report_counts_dialogs_and_their_rows() -> None:
    done = converted(DIALOG, DIALOG, use="sft")
    for number in (1, 1, 2):
        done.report.drop("longer than 9 tokens", number)
    told = "x: taskmaster-dialogs, 6 rows read from 2 source rows, 3 kept; dropped 3 longer than 9 tokens (rows 1, 2)"
    assert done.report.line() == told


def test_the_calls_of_a_taskmaster_3_dialog_come_before_what_the_agent_says() -> None:
    calls = [{"name": "find_movies", "args": {"location": "Davis"}, "response": {"movies": ["Cats"]}}]
    turns = [{"speaker": "user", "text": "films?"}, {"speaker": "assistant", "text": "Cats.", "apis": calls}]
    done = converted({"utterances": turns}, use="sft", chat=False)
    assert [row.completion for row in done.rows] == [' {"find_movies": {"location": "Davis"}}', " Cats."]
    assert done.rows[1].prompt.endswith(
        'agent: {"find_movies": {"location": "Davis"}}\napi: {"find_movies": {"movies": ["Cats"]}}\nagent:'
    )


def test_a_dialog_with_unreadable_calls_is_dropped() -> None:
    """Some dialogs of Taskmaster-4 were published like this."""
    note = [{"name": "api_call", "value": "add"}, {"name": "request", "value": '{"id": "1" "n": 2}'}]
    broken = {"utterances": [{"speaker": "user", "text": "a", "annotations": note}]}
    done = converted(DIALOG, broken, use="sft")
    assert done.numbers == [1, 1, 1]
    assert done.report.dropped == {"with a call or response that is not valid JSON": [2]}


def test_the_limits_of_shp_keep_strong_pairs_and_few_of_a_post() -> None:
    ratios = [4.0, 1.5, 2.0, 3.0]
    raws = [{**SHP, "score_ratio": ratio} for ratio in ratios]
    raws += [{**SHP, "post_id": "p2", "score_ratio": None, "score_A": a, "score_B": 10} for a in (5, 6)]
    done = converted(*raws, use="reward", shp_score_ratio=2, shp_per_post=2)
    assert done.numbers == [1, 3, 5]
    assert done.report.dropped == {"with a score ratio below 2": [2, 6], "beyond the first 2 of their post": [4]}
    assert converted(*raws, use="reward").numbers == [1, 2, 3, 4, 5, 6]


UNLABELLED = "without a label"


@pytest.mark.parametrize("use", ["sft", "reward", "rl"])
@pytest.mark.parametrize("bad", [None, "", float("nan"), ...], ids=["null", "empty", "NaN", "missing"])
@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"prompt": "a", "completion": "b", "label": 1}, "label"),
        (SHP, "labels"),
        (COMPARISON, "choice"),
        (TASK, "reward"),
        (STEP, "label"),
    ],
    ids=["thumbs", "shp", "summarize-from-feedback", "taskmaster", "android-control"],
)
def test_rows_without_a_label_are_counted_and_their_prompts_are_used(raw: Raw, field: str, bad: Any, use: str) -> None:
    without = {key: value for key, value in raw.items() if key != field}
    done = converted(raw, without if bad is ... else {**raw, field: bad}, raw, use=use)
    is_demonstration = field == "label" and "action" in raw and bad is ... and use == "sft"
    kept = use == "rl" or is_demonstration
    assert done.numbers == ([1, 2, 3] if kept else [1, 3])
    assert done.report.dropped == ({} if kept else {UNLABELLED: [2]})
    assert (done.report.read, done.report.kept) == (3, len(done.rows))


@pytest.mark.parametrize("use", ["sft", "reward"])
def test_pairs_of_shp_with_equal_scores_are_ties(use: str) -> None:
    done = converted(SHP, {**SHP, "score_A": 7, "score_B": 7}, use=use)
    assert (done.numbers, done.report.dropped) == ([1], {"with tied scores": [2]})
    assert converted({**SHP, "score_A": 7, "score_B": 7}, use="rl").numbers == [1]


def test_a_choice_may_be_a_float_as_pandas_writes_it() -> None:
    assert (
        converted({**COMPARISON, "choice": float(COMPARISON["choice"])}, use="reward").rows
        == converted(COMPARISON, use="reward").rows
    )
