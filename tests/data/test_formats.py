"""Formats: published data sets of the shape that they have, and the table that documents all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from perlcli.data import Data, Demonstration, Preference, Prompt, Thumb, published
from perlcli.data.formats import FORMATS, NAMES, Converter, detect, table
from perlcli.data.rows import SourceRow
from perlcli.errors import PerlError

Raw = dict[str, Any]
Perl = Callable[..., Result]
SHP: Raw = {
    "post_id": "p1",
    "domain": "askculinary_test",
    "upvote_ratio": 0.99,
    "history": "How do I boil an egg?",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "created_at_utc_A": 1,
    "created_at_utc_B": 2,
    "score_A": 3,
    "score_B": 12,
    "human_ref_A": "In a pan.",
    "human_ref_B": "Six minutes, then cold water.",
    "labels": 0,
    "seconds_difference": 1.0,
    "score_ratio": 4.0,
}
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


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> list[dict[str, str]]:
    return [said("user", content)]


def agent(content: str) -> list[dict[str, str]]:
    return [said("assistant", content)]


def converted(*raws: Raw, use: str, chat: bool = True, **options: Any) -> Data:
    made = Converter(use, "x", chat=chat, **options)
    found = Data([], [], made.report)
    for number, raw in enumerate(raws, start=1):
        for row in made.take(number, SourceRow(f"x, row {number}", raw)):
            found.rows.append(row)
            found.numbers.append(number)
    made.faults.check()
    return found


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
        (
            {"chosen": "The sky is green.", "rejected": "The sky is gray."},
            "rl",
            "pairs",
            *[Prompt("The sky is")] * 2,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_published_row_is_read_as_a_chat_or_as_text(raw: Raw, use: str, name: str, chat: Any, text: Any) -> None:
    for has_template, row in ((True, chat), (False, text)):
        done = converted(raw, use=use, chat=has_template)
        assert done.report.format == name
        assert done.rows == [row]


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


def test_rows_of_dialogs_are_told_beside_the_dialogs() -> None:
    done = converted(DIALOG, DIALOG, use="sft")
    for number in (1, 1, 2):
        done.report.drop("longer than 9 tokens", number)
    told = "x: taskmaster-dialogs, 6 rows read from 2 source rows, 3 kept; dropped 3 longer than 9 tokens (rows 1, 2)"
    assert done.report.line() == told


def test_the_calls_of_a_taskmaster_3_dialog_stand_before_what_the_agent_says() -> None:
    calls = [{"name": "find_movies", "args": {"location": "Davis"}, "response": {"movies": ["Cats"]}}]
    turns = [{"speaker": "user", "text": "films?"}, {"speaker": "assistant", "text": "Cats.", "apis": calls}]
    done = converted({"utterances": turns}, use="sft", chat=False)
    assert [row.completion for row in done.rows] == [' {"find_movies": {"location": "Davis"}}', " Cats."]
    assert done.rows[1].prompt.endswith(
        'agent: {"find_movies": {"location": "Davis"}}\napi: {"find_movies": {"movies": ["Cats"]}}\nagent:'
    )


def test_a_dialog_whose_calls_can_not_be_read_is_set_aside() -> None:
    """As some of Taskmaster-4 are published."""
    note = [{"name": "api_call", "value": "add"}, {"name": "request", "value": '{"id": "1" "n": 2}'}]
    broken = {"utterances": [{"speaker": "user", "text": "a", "annotations": note}]}
    done = converted(DIALOG, broken, use="sft")
    assert done.numbers == [1, 1, 1]
    assert done.report.dropped == {"with a call or response that is not valid JSON": [2]}


def test_the_limits_of_shp_keep_strong_pairs_and_few_of_a_post() -> None:
    ratios = [4.0, 1.5, 2.0, 3.0]
    raws = [{**SHP, "score_ratio": ratio} for ratio in ratios]
    raws += [{**SHP, "post_id": "p2", "score_ratio": None, "score_A": a, "score_B": 10} for a in (5, 6)]
    done = converted(*raws, use="reward", limit=published.shp_limits(2, 2))
    assert done.numbers == [1, 3, 5]
    assert done.report.dropped == {"with a score ratio below 2": [2, 6], "beyond the first 2 of their post": [4]}
    assert converted(*raws, use="reward", limit=published.shp_limits(None, None)).numbers == [1, 2, 3, 4, 5, 6]


def test_the_limits_of_shp_hold_where_the_data_is_shp(perl: Perl, write: Any, tmp_path: Path) -> None:
    """Held-out pairs of another format are measured all the same."""
    train = write(tmp_path / "shp.jsonl", [SHP, {**SHP, "score_ratio": 1.2}, {**SHP, "post_id": "p2"}])
    dev = write(tmp_path / "dev.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    options = ("--shp-score-ratio", 2, "--shp-per-post", 1, "--dry-run")
    told = perl("reward", "--data", train, "--eval-data", dev, *options).stdout
    assert f"{train}: shp, 3 rows read, 2 kept; dropped 1 with a score ratio below 2 (row 2)" in told
    assert f"{dev}: pairs, 1 row read, 1 kept" in told
    assert perl("reward", "--data", train, "--eval-data", train, *options).stdout.count("shp, 3 rows read, 2 kept") == 2


UNLABELLED = "without a label"
TASK = {
    "context": json.dumps([{"role": "user", "text": "a latte"}]),
    "generation": json.dumps({"role": "agent", "text": "yes"}),
    "reward": 1.0,
}


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
def test_rows_that_nobody_judged_are_counted_and_their_prompts_are_used(
    raw: Raw, field: str, bad: Any, use: str
) -> None:
    without = {key: value for key, value in raw.items() if key != field}
    done = converted(raw, without if bad is ... else {**raw, field: bad}, raw, use=use)
    is_demonstration = field == "label" and "action" in raw and bad is ... and use == "sft"
    kept = use == "rl" or is_demonstration
    assert done.numbers == ([1, 2, 3] if kept else [1, 3])
    assert done.report.dropped == ({} if kept else {UNLABELLED: [2]})
    assert (done.report.read, done.report.kept) == (3, len(done.rows))


def test_a_label_on_another_scale_is_an_error_and_not_left_out() -> None:
    """Of five stars, one is bad: read as a thumb it would be up."""
    with pytest.raises(PerlError, match="row 2: label must be 0, 1, true or false, not 5"):
        converted(*({"prompt": "a", "completion": "b", "label": stars} for stars in (1, 5)), use="reward")


@pytest.mark.parametrize("use", ["sft", "reward"])
def test_pairs_of_shp_with_equal_scores_are_ties(use: str) -> None:
    done = converted(SHP, {**SHP, "score_A": 7, "score_B": 7}, use=use)
    assert (done.numbers, done.report.dropped) == ([1], {"with tied scores": [2]})
    assert converted({**SHP, "score_A": 7, "score_B": 7}, use="rl").numbers == [1]


def test_a_choice_may_be_the_whole_number_that_pandas_makes_of_it() -> None:
    assert (
        converted({**COMPARISON, "choice": float(COMPARISON["choice"])}, use="reward").rows
        == converted(COMPARISON, use="reward").rows
    )


def test_a_prompt_that_says_nothing_is_counted() -> None:
    done = converted({"prompt": "a"}, {"prompt": " \n"}, {"prompt": user(" ")}, use="rl")
    assert (done.numbers, done.report.dropped) == ([1], {"with an empty prompt": [2, 3]})


def test_a_named_format_is_that_of_the_held_out_data_too(perl: Perl, write: Any, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "label": "a note"}
    paths = [write(tmp_path / name, [row]) for name in ("train.jsonl", "dev.jsonl")]
    words = ("--data", paths[0], "--eval-data", paths[1], "--dry-run")
    told = perl("sft", *words, "--data-format", "prompt-completion").stdout
    assert told.count("prompt-completion, 1 row read, 1 kept") == 2
    assert "label must be 0, 1" in perl("sft", *words, code=2).stderr


def test_a_model_is_measured_on_the_split_that_is_named(perl: Perl, rows: dict[str, Path], reward_run: Path) -> None:
    words = ("eval", "--model", reward_run, "--data", rows["pairs"], "--output", "eval", "--dry-run")
    assert "pairs, 12 rows read, 12 kept" in perl(*words).stdout
    assert "pairs, 32 rows read, 32 kept" in perl(*words, "--split", "train").stdout


def test_a_name_overrides_what_the_columns_look_like() -> None:
    raw = {"prompt": "a", "completion": "b", "label": 1}
    assert converted(raw, use="sft").report.format == "thumbs"
    done = converted({**raw, "label": "a note"}, use="sft", name="prompt-completion")
    assert (done.report.format, done.rows) == ("prompt-completion", [Demonstration("a", "b")])
    with pytest.raises(PerlError, match="needs the columns instruction, output; x has prompt, completion, label"):
        converted(raw, use="sft", name="alpaca")


def test_every_format_is_told_from_all_others() -> None:
    assert len(NAMES) == len(FORMATS)
    fields = {"chosen": "a", "rejected": "b", "goal": "c"}
    for known in FORMATS:
        raw = {column: fields.get(column, "x") for column in known.columns}
        raw |= {"goal": "c"} if known.name == "android-control" else {}
        raw |= dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b") if known.name == "hh" else {}
        assert detect(raw) == known


def test_the_readme_has_the_table_of_all_formats() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert table() in readme
    assert all(f"| `{name}` |" in readme for name in NAMES)


def test_what_two_texts_share_is_found_in_one_pass() -> None:
    """A pattern that looks for a word's end from each of its letters took a quarter of a minute for such a word."""
    word = "x" * 200_000
    found = SourceRow("row 1", {"chosen": f"{word} a b", "rejected": f"{word} a c"})
    (row,) = Converter("rl", "rows", chat=False).take(1, found)
    assert row == Prompt(f"{word} a", {})
