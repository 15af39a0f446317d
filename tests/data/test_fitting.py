"""Rows within a length: what `--on-long` does to longer ones, and that rows encoded at once get the same ids."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from row_samples import THUMB, lines, of
from transformers import AutoTokenizer

from perlcli import coffee, data, settings
from perlcli.data import Demonstration, Preference, Prompt, Renderer, Thumb
from perlcli.data.chat import Style
from perlcli.data.fitting import Fitting, Room, length_of, truncate
from perlcli.data.render import of_demonstration, of_preference, of_prompt
from perlcli.data.rows import DataReport
from perlcli.errors import PerlError
from perlcli.run.record import read_record
from perlcli.training import reward_model
from perlcli.training.prepare import prepare
from perlcli.training.rows import load_data

LONG = " ".join(f"order {place}" for place in range(60))


def fitted(rows: data.Data, room: Room, tokens: Any, *, most: int | None = None, **how: Any) -> list[dict[str, Any]]:
    return list(Fitting(rows.report, room, tokens, **how).columns(rows, most))


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module", params=["chat", "text", "coffee"])
def render(request: Any, llama: Path, gpt2: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained({"chat": llama, "text": gpt2, "coffee": coffee.BASE}[request.param]))


@pytest.fixture(scope="module")
def chat(llama: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(llama))


def test_rows_encoded_at_once_get_the_ids_they_get_alone(render: Renderer) -> None:
    said, answer = [message("user", "ä latte")], [message("assistant", " a  mocha\n")]
    rows: list[Any] = [Preference("a ", "latte", " mocha"), Preference(None, "a", "a b"), Thumb("a", "b", True)]
    if render.chat:
        rows += [Preference(said, answer, [*answer, *said, *answer]), Thumb(said, answer, False)]
        rows += [Preference(None, [*said, *answer], said)]
    alone = [of_preference(render, row) for row in rows]
    assert fitted(of(*rows), Room(1000), partial(of_preference, render), render=render) == alone


@pytest.mark.parametrize("kind", ["demonstration", "prompt"])
def test_demonstrations_and_prompts_too(kind: str, render: Renderer) -> None:
    tokens = of_demonstration if kind == "demonstration" else of_prompt
    rows: list[Any] = [Demonstration("a", "b"), Demonstration(None, "b")] if kind == "demonstration" else [Prompt("a")]
    if render.chat:
        said = [message("user", "a latte")]
        rows.append(Demonstration(said, [message("assistant", "b")]) if kind == "demonstration" else Prompt(said))
    alone = [tokens(render, row) for row in rows]
    assert fitted(of(*rows), Room(1000), partial(tokens, render), render=render) == alone


def test_what_was_foreseen_is_not_encoded_again(chat: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Preference([message("user", "a")], [message("assistant", "b")], [message("assistant", "c")])
    wanted = of_preference(chat, row)
    chat.foresee([row])
    monkeypatch.setattr(chat.tokenizer, "apply_chat_template", None)
    assert of_preference(chat, row) == wanted
    chat.forget()


def test_only_the_latest_that_was_foreseen_is_kept(chat: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perlcli.data.encoding.FORESEEN", 10)
    chat = Renderer(chat.tokenizer, style=Style(chat=False))
    for place in range(5):
        chat.foresee([Prompt(f"a latte {place} large"), Prompt(f"a mocha {place} large")])
        assert list(chat.encoder._texts)[-2:] == [f"a latte {place} large", f"a mocha {place} large"]
    assert len(chat.encoder._texts) < 10
    chat.forget()
    assert not chat.encoder._texts


def test_a_row_that_can_not_be_rendered_is_still_an_error(gpt2: Path) -> None:
    text = Renderer(AutoTokenizer.from_pretrained(gpt2))
    with pytest.raises(PerlError, match="has no chat template"):
        fitted(of(Prompt([message("user", "a")])), Room(100), partial(of_prompt, text), render=text)


def test_truncation_cuts_the_prompt_and_keeps_the_completion(render: Renderer) -> None:
    render = Renderer(render.tokenizer, style=Style(chat=False))
    row = Preference(f"{LONG} the end:", " latte", " a large mocha")
    tokens = partial(of_preference, render)
    cut = truncate(row, 40, tokens, render)
    assert isinstance(cut, Preference)
    assert (cut.chosen, cut.rejected) == (row.chosen, row.rejected)
    assert isinstance(cut.prompt, str) and isinstance(row.prompt, str)
    assert row.prompt.endswith(cut.prompt) and cut.prompt.endswith("the end:") and len(cut.prompt) < len(row.prompt)
    assert 30 < length_of(tokens(cut)) <= 40
    first = render.prompt_ids("")
    assert tokens(cut)["chosen_ids"][: len(first)] == first  # BOS, where the tokenizer has one


def test_the_oldest_turns_of_a_conversation_are_cut_first(chat: Renderer) -> None:
    system, last = message("system", "be kind"), message("user", "a latte")
    prompt = [system, message("user", LONG), message("assistant", "yes"), last]
    tokens = partial(of_demonstration, chat)
    row = Demonstration(prompt, [message("assistant", "done")])
    longest = length_of(tokens(Demonstration([system, last], row.completion)))
    fits = truncate(row, longest, tokens, chat)
    assert fits is not None and fits.prompt == [system, last]
    some = truncate(row, longest + 30, tokens, chat)
    assert some is not None and isinstance(some.prompt, list)
    assert [part["role"] for part in some.prompt] == ["system", "user", "assistant", "user"]
    assert LONG.endswith(some.prompt[1]["content"])
    assert length_of(tokens(some)) <= longest + 30


@pytest.mark.parametrize(
    "row",
    [
        Demonstration("short", LONG),
        Demonstration(None, LONG),
        Demonstration([message("system", LONG)], [message("assistant", "a")]),
    ],
    ids=["completion", "no prompt", "system message"],
)
def test_no_cut_is_made_if_none_is_enough(row: Demonstration, chat: Renderer) -> None:
    assert truncate(row, 20, partial(of_demonstration, chat), chat) is None


def test_what_was_cut_and_what_could_not_be_is_counted(chat: Renderer) -> None:
    rows = of(Demonstration("a", "b"), Demonstration(LONG, "b"), Demonstration("a", LONG))
    found = fitted(rows, Room(20), partial(of_demonstration, chat), on_long="truncate", render=chat)
    assert len(found) == 2
    assert (rows.numbers, rows.report.truncated, rows.report.kept) == ([1, 2], [2], 2)
    assert rows.report.dropped == {"longer than 20 tokens even with the prompt cut": [3]}
    assert "1 prompt cut from the left (row 2)" in rows.report.lines()
    assert rows.report.tokens["max"] > 60


def test_an_error_names_the_rows_and_the_longest(chat: Renderer) -> None:
    rows = of(Prompt("a"), *[Prompt(LONG)] * 12)
    with pytest.raises(PerlError) as caught:
        fitted(rows, Room(20), partial(of_prompt, chat), on_long="error", render=chat)
    longest = len(chat.prompt_ids(LONG))
    assert caught.value.problem == (
        f"x: 12 rows longer than 20 tokens, the longest with {longest}: rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11…"
    )
    assert caught.value.hint == "use a higher --max-length, --on-long drop or --on-long truncate"


def test_a_table_of_tokens_made_in_parts_is_the_same(
    llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of tokens take five times the memory, so only some rows are lists at a time."""
    monkeypatch.setattr("perlcli.training.rows.PART", 5)
    given = {"model": str(llama), "data": str(rows["pairs"]), "dry_run": True}
    sides = []
    for make in (reward_model.table, reward_model.tokens):
        prepared = prepare(settings.build(settings.Reward, given))
        found = make(load_data(prepared, "reward"), prepared, "train")
        sides.append((list(found), prepared.run.prompts, prepared.run.record.data["train"]))
    assert sides[0] == sides[1]
    assert len(sides[0][0]) == 32


CUT = {
    "sft": {"prompt": LONG, "completion": "b"},
    "reward": {"prompt": LONG, "chosen": "b", "rejected": "c"},
    "thumbs": {"prompt": LONG, "completion": "b", "label": 1},
    "rl": {"prompt": LONG},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_each_stage_cuts_or_refuses_when_asked(name: str, perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    command = "reward" if name == "thumbs" else name
    second = {"label": 0} if name == "thumbs" else {}
    source = write(
        tmp_path / "a.jsonl", [CUT[name], {**CUT[name], "prompt": "a"}, {**CUT[name], "prompt": "b", **second}]
    )
    words = [command, "-m", llama, "-d", source, "--max-length", 64, "--dry-run", "-o", tmp_path / "run"]
    words += ["--reward", "perlcli.coffee:reward", "--max-completion-length", 32] if command == "rl" else []
    assert "1 prompt cut from the left (row 1)" in perl(*words, "--on-long", "truncate").stdout
    assert "dropped 1 longer than" in perl(*words).stdout
    assert "1 row longer than" in perl(*words, "--on-long", "error", code=2).stderr


def test_eval_cuts_too_and_records_it(perl: Any, reward_run: Path, tmp_path: Path, write: Any) -> None:
    source = write(tmp_path / "a.jsonl", [CUT["reward"], {"prompt": "a", "chosen": "b", "rejected": "c"}])
    words = ("-m", reward_run, "-d", source, "--max-length", 64, "--on-long", "truncate", "-o", tmp_path / "run")
    perl("eval", *words)
    told = read_record(tmp_path / "run").data["eval"]
    assert (told["kept"], told["truncated"]) == (2, {"count": 1, "first_rows": [1]})
    assert told["tokens"]["max"] > 64


def test_a_long_conversation_is_cut_in_a_few_steps(chat: Renderer) -> None:
    """Tried turn by turn, a conversation of ten thousand turns took most of an hour."""
    prompt = [message("user" if place % 2 == 0 else "assistant", f"order {place}") for place in range(1001)]
    looks = 0

    def tokens(row: Any) -> dict[str, Any]:
        nonlocal looks
        looks += 1
        return of_demonstration(chat, row)

    row = Demonstration(prompt, [message("assistant", "ok")])
    cut = truncate(row, 80, tokens, chat)
    assert cut is not None
    assert cut.prompt is not None
    assert length_of(of_demonstration(chat, cut)) <= 80
    assert cut.prompt[-1] == prompt[-1]
    assert looks < 20
    assert truncate(row, 5, tokens, chat) is None


def test_rows_that_are_too_long_are_dropped_by_their_number_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({**THUMB, "completion": "x" * n} for n in (2, 5, 6, 1))))
    found = data.load(str(tmp_path / "a.jsonl"), "reward")
    kept = fitted(found, Room(5), lambda row: {"ids": list(row.completion), "label": 1.0})
    assert [len(row["ids"]) for row in kept] == [2, 5, 1]
    assert (found.report.read, found.report.kept) == (4, 3)
    assert found.report.line().endswith("4 rows read, 3 kept; dropped 1 longer than 5 tokens (row 3)")


def test_the_longest_list_of_a_row_counts() -> None:
    found = data.Data([Prompt("a")], [1], DataReport("x", "pairs", 1, 1))
    with pytest.raises(PerlError, match="every row is longer than 2 tokens\nHint: use a higher --max-length"):
        fitted(found, Room(2), lambda row: {"chosen_ids": [1], "rejected_ids": [1, 2, 3]})


def of_lengths(*lengths: int) -> data.Data:
    rows: list[Any] = [Prompt("x" * length) for length in lengths]
    return data.Data(rows, list(range(1, len(rows) + 1)), DataReport("x", "prompts", len(rows), len(rows)))


def ids(row: Any) -> dict[str, Any]:
    return {"ids": list(row.prompt)}


def test_data_most_of_whose_rows_are_too_long_is_refused_unless_dropping_was_asked_for() -> None:
    with pytest.raises(PerlError) as refused:
        fitted(of_lengths(3, 9, 9, 20), Room(10, completion=6), ids)
    assert (
        refused.value.problem == "x: 3 of 4 rows are longer than 4 tokens (--max-length 10 less 6 for the completion)"
    )
    assert refused.value.hint == (
        "--max-length 26 keeps 90 % of the rows, --on-long truncate cuts prompts, --on-long drop leaves 1 row"
    )
    assert len(fitted(of_lengths(3, 9, 9, 20), Room(10, completion=6), ids, on_long="drop")) == 1
    assert len(fitted(of_lengths(3, 3, 9, 20), Room(10, completion=6), ids)) == 2


def test_the_first_rows_that_fit_are_counted() -> None:
    found = of_lengths(9, 3, 9, 2, 1)
    assert [len(row["ids"]) for row in fitted(found, Room(4), ids, on_long="drop", most=2)] == [3, 2]
    assert found.numbers == [2, 4]
    assert found.report.kept == 2


def test_a_completion_that_takes_all_the_room_is_an_error() -> None:
    with pytest.raises(PerlError, match="--max-length 6 leaves no room for a prompt before --max-completion-length 6"):
        Room(6, completion=6)
