"""Where completions end: at EOS or with the token that completes a stop string, and what a reward reads of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perlcli.data import Renderer
from perlcli.model import tokenizers
from perlcli.model.sources import locate
from perlcli.rollouts.stops import Ends, stopping

PAD = 3


@pytest.fixture(scope="module")
def render(llama: Path) -> Renderer:
    source = locate(str(llama))
    return tokenizers.renderer(source, tokenizers.load_tokenizer(source))


def ids(render: Renderer, text: str) -> list[int]:
    return list(render.encoder.chat(text))


CASES: dict[str, tuple[list[str], str, str]] = {  # stop strings, what would be written, what a reward reads
    "plain": (["\nHuman:"], "A latte.\nHuman: and now?", "A latte."),
    "within a token": (["f"], "coffee", "co"),
    "at once": (["a"], "a latte", ""),
    "the first of two": (["tall", "large"], "a large, a tall", "a "),
    "of several bytes": (["é"], "un café, s'il vous plaît", "un caf"),
    "part of a character": (["☕"], "a 🫖 or ☕ please", "a 🫖 or "),
    "a special token": (["<|im_start|>"], "yes<|im_start|>user", "yes"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stop_string_ends_a_completion_and_is_not_read(render: Renderer, name: str) -> None:
    stop, text, wanted = CASES[name]
    ends, written = Ends(render, stop), ids(render, text)
    cut = ends.cut([*written, PAD, PAD])
    assert cut == written[: len(cut)]
    assert not any(text in render.tokenizer.decode(cut[:-1]) for text in stop)
    assert ends.ended(cut) and not render.ended(cut)
    answer = ends.answer(cut)
    assert render.ended(answer)
    assert render.tokenizer.decode(answer[:-1]) == wanted == render.text(answer)


def test_tokens_before_the_stop_string_stay_as_they_were_written(render: Renderer) -> None:
    strange = [ids(render, letter)[0] for letter in "latte"]  # a tokenizer would join the letters
    assert strange != ids(render, "latte")
    stop = ids(render, "\nHuman:")
    assert Ends(render, ["\nHuman:"]).answer([*strange, *stop]) == [*strange, render.tokenizer.eos_token_id]


def test_eos_comes_first_and_leaves_a_completion_as_it_is(render: Renderer) -> None:
    ends, eos = Ends(render, ["tall"]), render.tokenizer.eos_token_id
    written = [*ids(render, "a latte"), eos]
    assert ends.cut([*written, *ids(render, "tall")]) == written
    assert ends.answer(written) == written
    assert Ends(render, [render.tokenizer.eos_token]).answer(written) == written


def test_a_completion_that_was_cut_off_has_not_ended(render: Renderer) -> None:
    written = ids(render, "a latte")
    for stop in ([], [""], ["tall"]):
        ends = Ends(render, stop)
        assert ends.cut(written) == written == ends.answer(written)
        assert not ends.ended(written) and not ends.ended([])


def test_the_prompt_is_no_part_of_a_stop_string(render: Renderer) -> None:
    prompt, rest = ids(render, "Hum"), ids(render, "an: b")
    (criterion,) = Ends(render, ["Human:"]).criteria(len(prompt))
    for count in range(1, len(rest) + 1):
        assert not criterion(torch.tensor([prompt + rest[:count]]), None).any()
    (criterion,) = Ends(render, ["Human:"]).criteria(0)
    assert any(criterion(torch.tensor([(prompt + rest)[:count]]), None).any() for count in range(1, 9))


def test_rows_end_on_their_own(render: Renderer) -> None:
    (criterion,) = Ends(render, ["tall"]).criteria(1)
    first, second = ids(render, "tall"), ids(render, "lat")
    width = max(len(first), len(second))
    rows = [[7, *[8] * (width - len(row)), *row] for row in (first, second)]
    assert criterion(torch.tensor(rows), None).tolist() == [True, False]


def test_without_stop_strings_generate_is_left_alone(render: Renderer) -> None:
    model: Any = type("Model", (), {"generate": lambda self, **given: given})()
    assert not Ends(render, []).criteria(4)
    with stopping(model, Ends(render, [""])):
        assert "generate" not in vars(model)
    with pytest.raises(ZeroDivisionError), stopping(model, Ends(render, ["a"])):
        assert len(model.generate(input_ids=torch.zeros(1, 4))["stopping_criteria"]) == 1
        raise ZeroDivisionError
    assert "generate" not in vars(model)
