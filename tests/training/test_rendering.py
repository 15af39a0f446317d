"""How a run renders its rows is kept, taken over by what starts from it, and an error where it differs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT, SHORT
from transformers import AutoTokenizer

from perlcli import settings
from perlcli.data import Prompt
from perlcli.errors import PerlError
from perlcli.model import sources, tokenizers
from perlcli.run.record import read_record
from perlcli.training import rendering
from perlcli.training.prepare import prepare

KWARGS = "{enable_thinking: false}"
DATED = CHAT.replace("{% for", "{{ 'Today: ' + strftime_now('%Y-%m-%d') + '\\n' }}{% for", 1)
PAIR = {"prompt": "order", "chosen": "latte", "rejected": "no"}


def changed(run: Path, folder: Path, **rendered: Any) -> Path:
    """A copy of a run whose record says that it rendered rows in another way; without any, that it doesn't say."""
    shutil.copytree(run, folder)
    record = json.loads((folder / "record.json").read_text())
    if rendered:
        record["model"]["rendering"] |= rendered
    else:
        del record["model"]["rendering"]
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def options(run: Path, **more: Any) -> Any:
    return settings.build(
        settings.Rl, {"model": str(run), "data": "coffee", "reward": ("perlcli.coffee:reward",), **more}
    )


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory: pytest.TempPathFactory, perl: Any, llama: Path, rows: dict[str, Path]) -> Path:
    """A policy trained with --no-chat and a variable for its template."""
    folder = tmp_path_factory.mktemp("runs") / "quiet"
    words = ("--no-chat", "--chat-template-kwargs", KWARGS)
    perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", folder, *SHORT, *words)
    return folder


@pytest.mark.slow
def test_what_starts_from_a_run_renders_as_it_did(quiet_run: Path, sft_run: Path) -> None:
    style = prepare(options(quiet_run)).renderer.style
    assert (style.chat, style.options) == (False, {"enable_thinking": False})
    style = prepare(options(sft_run)).renderer.style
    assert (style.chat, style.options) == (True, {})
    assert read_record(quiet_run).model["rendering"] == {
        "chat": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "loss_on": "assistant",
    }


@pytest.mark.slow
def test_other_options_than_a_run_was_trained_with_are_an_error(quiet_run: Path, sft_run: Path) -> None:
    with pytest.raises(PerlError, match=f"--chat: {quiet_run} was trained with --no-chat"):
        prepare(options(quiet_run, chat=True))
    with pytest.raises(PerlError, match=f"--no-chat: {sft_run} was trained with --chat"):
        prepare(options(sft_run, chat=False))
    with pytest.raises(
        PerlError, match=r"--chat-template-kwargs .*: .* was trained with .*\nHint: leave the option out"
    ):
        prepare(options(quiet_run, chat_template_kwargs="{enable_thinking: true}"))


def test_a_reward_or_anchor_that_read_other_text_is_an_error(
    quiet_run: Path, sft_run: Path, reward_run: Path, perl: Any, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = ("-d", rows["prompts"], "-o", tmp_path / "run", "--dry-run")
    result = perl("rl", "-m", quiet_run, "--reward", reward_run, *words, code=2)
    assert f"The reward {reward_run} was trained with --chat, but here it is --no-chat and with" in result.stderr
    result = perl("rl", "-m", sft_run, "--reward", reward_run, "--anchor", quiet_run, *words, code=2)
    assert f"--anchor {quiet_run} was trained with --no-chat, but here it is --chat" in result.stderr


def test_a_run_of_an_earlier_version_needs_the_choice_for_text_rows(sft_run: Path, tmp_path: Path) -> None:
    old = changed(sft_run, tmp_path / "old")
    render = prepare(options(old)).renderer
    assert render.prompt_ids([{"role": "user", "content": "a"}])  # conversations are rendered as before
    with pytest.raises(PerlError, match=r"it isn't recorded which it learned\nHint: --chat or --no-chat"):
        render.prompt_ids("a")
    for chat in (True, False):
        assert prepare(options(old, chat=chat)).renderer.prompt_ids("a")


@pytest.mark.slow
def test_a_reward_of_an_earlier_version_needs_it_too(
    llama: Path, reward_run: Path, perl: Any, write: Any, tmp_path: Path
) -> None:
    old = changed(reward_run, tmp_path / "old")
    source = write(tmp_path / "rows.jsonl", [{"prompt": "order a latte"}])
    words = ("-m", llama, "--reward", old, "-d", source, "-o", tmp_path / "run", "--dry-run")
    assert "it isn't recorded which it learned" in perl("rl", *words, code=2).stderr
    perl("rl", *words, "--chat")


def test_a_run_of_an_earlier_version_can_not_be_resumed(
    sft_run: Path, tmp_path: Path, perl: Any, llama: Path, rows: dict[str, Path]
) -> None:
    old = changed(sft_run, tmp_path / "old")
    words = ("-m", llama, "-d", rows["demonstrations"], *SHORT, "--max-steps", "3", "--resume")
    assert "rendered rows differently" in perl("sft", *words, "-o", old, code=2).stderr
    other = changed(sft_run, tmp_path / "other", loss_on="all")
    assert "the rendering of rows was" in perl("sft", *words, "-o", other, code=2).stderr


@pytest.mark.slow
def test_one_date_is_kept_from_stage_to_stage(
    llama: Path, tmp_path: Path, perl: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    source = write(tmp_path / "rows.jsonl", [PAIR] * 4)
    words = ("-d", source, *SHORT, "--max-steps", "1")
    for stage, given in (("sft", {}), ("reward", {})):
        perl(stage, "-m", llama, "-o", tmp_path / stage, "--chat-template", tmp_path / "dated.jinja", *words, **given)
    assert rendering.recorded(read_record(tmp_path / "sft")).date  # type: ignore[union-attr]
    past, older = (
        changed(tmp_path / stage, tmp_path / f"old-{stage}", date=day)
        for stage, day in (("sft", "2024-03-05"), ("reward", "2023-01-02"))
    )
    prepared = prepare(options(past))
    assert "Today: 2024-03-05" in prepared.tokenizer.decode(prepared.renderer.prompt_ids("order"))
    reward = sources.locate(str(older))
    own = rendering.as_trained(prepared.renderer, reward)
    assert "Today: 2023-01-02" in prepared.tokenizer.decode(own.scored_ids("order", [5]))
    perl(
        "rl", "-m", past, "--reward", older, *words, "-o", tmp_path / "rl", "--max-completion-length", "8", "--dry-run"
    )


@pytest.mark.slow
def test_a_template_from_a_file_is_saved_with_the_adapter(
    llama: Path, tmp_path: Path, perl: Any, write: Any, sft_run: Path
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHAT.replace("'<|im_end|>\n'", "'<|im_end|>'"))
    source = write(tmp_path / "rows.jsonl", [PAIR] * 4)
    words = ("-d", source, *SHORT, "--max-steps", "1", "--chat-template", file)
    perl("sft", "-m", llama, *words, "-o", tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == file.read_text()
    result = perl("sft", "-m", sft_run, *words, "-o", tmp_path / "other", code=2)
    assert "was trained with another tokenizer or chat template" in result.stderr


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{% if %}", "is not a chat template in Jinja"), (" ", "is empty"), (None, "Can't read --chat-template")],
)
def test_a_file_that_is_no_template_is_an_error(content: str | None, problem: str, llama: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.jinja").write_text(content)
    with pytest.raises(PerlError, match=problem):
        prepare(options(llama, chat_template=str(tmp_path / "a.jinja")))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "takes longer than 0.2 s"),
        ("{{ 'x' * 2000000 }}", "makes 2,000,000 characters of a message with one"),
    ],
)
def test_a_template_without_an_end_is_an_error(
    content: str, problem: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "SECONDS", 0.2)
    (tmp_path / "a.jinja").write_text(content)
    with pytest.raises(PerlError, match=rf"--chat-template .*a\.jinja {problem}"):
        prepare(options(llama, chat_template=str(tmp_path / "a.jinja")))


def test_a_template_that_writes_half_of_a_surrogate_pair_is_an_error(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(r"{{ '\ud800' }}{% for m in messages %}{{ m.content }}{% endfor %}")
    render = prepare(options(llama, chat_template=str(tmp_path / "a.jinja"))).renderer
    with pytest.raises(PerlError, match=r"The chat template can't render .* surrogates not allowed"):
        render.prompt_ids([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{self: 1}", "can't set self"),
        ("[1]", "must be a mapping"),
        ("{tokenize: false}", "can't set tokenize"),
        ("{", "is not valid YAML"),
    ],
)
def test_variables_that_are_none_are_an_error(text: str, problem: str, llama: Path) -> None:
    with pytest.raises(PerlError, match=f"--chat-template-kwargs {problem}"):
        prepare(options(llama, chat_template_kwargs=text))


def test_chat_without_a_template_is_an_error(gpt2: Path) -> None:
    with pytest.raises(PerlError, match=r"--chat: .* has no chat template\nHint: --chat-template FILE"):
        prepare(options(gpt2, chat=True))
    assert not prepare(options(gpt2)).renderer.style.chat


@pytest.mark.slow
def test_a_variable_that_the_template_does_not_read_is_named(llama: Path, rows: dict[str, Path], perl: Any) -> None:
    words = ("sft", "-m", llama, "-d", rows["demonstrations"], "--dry-run", "--chat-template-kwargs")
    told = perl(*words, "{enable_thinking: false}").stdout
    assert "--chat-template-kwargs: the chat template does not read enable_thinking." in told
    told = perl(*words, "{add_generation_promt: false}", code=2).stderr
    assert "does not read add_generation_promt\nHint: Did you mean add_generation_prompt?" in told


@pytest.mark.slow
def test_variables_in_a_config_file_may_be_nested(
    llama: Path, tmp_path: Path, perl: Any, rows: dict[str, Path]
) -> None:
    (tmp_path / "a.yaml").write_text(f"model: {llama}\nchat_template_kwargs:\n  enable_thinking: false\n")
    words = ("--config", tmp_path / "a.yaml", "-d", rows["demonstrations"], *SHORT, "--max-steps", "1")
    perl("sft", *words, "-o", tmp_path / "run")
    kept = read_record(tmp_path / "run").model["rendering"]["chat_template_kwargs"]
    assert kept == {"enable_thinking": False}


def test_rl_samples_from_the_prompts_that_are_shown(llama: Path) -> None:
    """A text prompt is a user turn in RL too, with what its row passes to the template."""
    render = prepare(options(llama)).renderer
    asked = [{"role": "user", "content": "a latte"}]
    assert render.prompt_ids("a latte") == render.prompt_ids(asked)
    assert render.rendered(Prompt("a latte", template={"x": 1}))[0][0] == render.prompt_ids(asked)
