"""From content to tokens: a reward model scores what it was trained on, and a policy's tokens are kept as they are."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from perlcli import coffee
from perlcli.data import Demonstration, Preference, Renderer, chat
from perlcli.data.chat import Chat, RowRefused, Style
from perlcli.data.render import IGNORED, of_demonstration
from perlcli.errors import PerlError

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '<e>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
NO_TAIL = CHATML.replace("'<e>\n'", "'<e>'")
NO_END = CHATML.replace("'<e>\n'", "'\n'")
OTHER_END = CHATML.replace("'<e>\n'", "'<turn>\n'")
THINKING = CHATML.replace("'<s>assistant\n'", "'<s>assistant\n<think>'")
MARKED = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<e>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<e>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
AS_TEXT = Style(chat=False)
TEXTS = ("b", " b", "b\n", "\n\n", "", "two words", "Grüße 世界 🙂", "a b\u2028c", '{"a": [1, 2]}')


def tokenizer(template: str | None, *, pad: str | None = "<pad>", eos: str | None = "<e>") -> Any:
    """A tokenizer of single bytes, except for `ab` and `bb`, which merge."""
    special = ["<pad>", "<s>", "<e>", "<turn>", "<think>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bb"]
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [("a", "b"), ("b", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    found = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token=pad)
    found.chat_template = template
    return found


CHATS = {
    "coffee": AutoTokenizer.from_pretrained(coffee.BASE),
    "tail": tokenizer(CHATML),
    "pad is EOS": tokenizer(CHATML, pad="<e>"),
    "no tail": tokenizer(NO_TAIL),
}
TAILS = {"coffee": "", "tail": "\n", "pad is EOS": "\n", "no tail": ""}
every_chat = pytest.mark.parametrize("name", CHATS)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def agent(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def templated(name: str, messages: list[dict[str, str]]) -> list[int]:
    return CHATS[name].apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def without_tail(name: str, ids: list[int]) -> list[int]:
    """What a policy writes: everything up to EOS."""
    return ids[: ids.index(CHATS[name].eos_token_id) + 1]


@every_chat
@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_completion_together_are_what_the_template_renders(name: str, text: str) -> None:
    render = Renderer(CHATS[name])
    prompt, completion = user("a question" + text), agent(text)
    assert render.prompt_ids(prompt) + render.completion_ids(prompt, completion) == templated(name, prompt + completion)


@every_chat
def test_longer_conversations_make_the_template_too(name: str) -> None:
    render = Renderer(CHATS[name])
    prompt, completion = user("a") + agent("b") + user("c"), agent("d") + user("e") + agent("f")
    whole = templated(name, prompt + completion)
    assert render.prompt_ids(prompt) + render.completion_ids(prompt, completion) == whole
    assert render.whole_ids(prompt + completion) == whole


@every_chat
def test_the_prompt_ends_where_the_policy_starts_to_write(name: str) -> None:
    text = CHATS[name].apply_chat_template(user("a"), tokenize=False, add_generation_prompt=True)
    assert CHATS[name].decode(Renderer(CHATS[name]).prompt_ids(user("a"))) == text


@every_chat
@pytest.mark.parametrize("text", TEXTS)
def test_a_completion_has_one_eos_followed_by_the_tail(name: str, text: str) -> None:
    render = Renderer(CHATS[name])
    ids = render.completion_ids(user("a"), agent(text))
    end = CHATS[name].eos_token_id
    assert ids.count(end) == 1
    assert CHATS[name].decode(ids[ids.index(end) + 1 :]) == TAILS[name]
    assert ids[ids.index(end) + 1 :] == render.tail


@every_chat
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_scored_is_what_was_trained_on(name: str, text: str) -> None:
    render = Renderer(CHATS[name])
    prompt = user("a question")
    trained = render.completion_ids(prompt, agent(text))
    scored = render.scored_ids(prompt, without_tail(name, trained))
    assert scored == render.prompt_ids(prompt) + trained


@every_chat
def test_a_completion_that_was_cut_off_has_neither_eos_nor_tail(name: str) -> None:
    render = Renderer(CHATS[name])
    written = without_tail(name, render.completion_ids(user("a"), agent("b b b")))[:-1]
    assert not render.ended(written)
    assert render.scored_ids(user("a"), written) == render.prompt_ids(user("a")) + written


@pytest.mark.parametrize("end", [["<e>"], []], ids=["ended", "cut off"])
def test_what_a_policy_wrote_is_kept_token_by_token(end: list[str]) -> None:
    made = CHATS["tail"]
    written = made.convert_tokens_to_ids(["a", "b", "b", *end])
    assert made("abb")["input_ids"] != written[:3]  # the tokenizer would merge them
    scored = Renderer(made).scored_ids(user("a"), written)
    start = Renderer(made).prompt_ids(user("a"))
    assert scored[len(start) : len(start) + len(written)] == written


def test_nothing_written_is_not_an_end() -> None:
    render = Renderer(CHATS["tail"])
    assert not render.ended([])
    assert render.scored_ids(user("a"), []) == render.prompt_ids(user("a"))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_completion_continues_its_prompt_and_ends(text: str) -> None:
    made = CHATS["tail"]
    render = Renderer(made, style=AS_TEXT)
    start, ids = render.prompt_ids("say:"), render.completion_ids("say:", text)
    assert made.decode(start + ids, skip_special_tokens=True) == "say:" + text
    assert start + ids == [*made("say:" + text)["input_ids"], made.eos_token_id]
    assert render.scored_ids("say:", ids) == start + ids  # a text has no tail


def test_a_text_completion_that_merges_with_its_prompt_starts_where_the_policy_would() -> None:
    made = CHATS["tail"]
    render = Renderer(made, style=AS_TEXT)
    assert len(made("ab")["input_ids"]) == 1
    assert render.prompt_ids("a") == made.convert_tokens_to_ids(["a"])
    assert render.completion_ids("a", "b") == made.convert_tokens_to_ids(["b", "<e>"])


def test_a_prompt_with_a_start_token_keeps_it_once() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer(None)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    render = Renderer(made)
    for prompt, text in (("say:", " b"), ("a", "b")):  # the second merges
        ids = render.prompt_ids(prompt) + render.completion_ids(prompt, text)
        assert ids[0] == 1 and ids.count(1) == 1
        assert made.decode(ids, skip_special_tokens=True) == prompt + text


@pytest.mark.parametrize(("text", "expected"), [("b", "b<e>"), ("b<e>", "b<e>"), ("b<e>\n", "b<e>\n"), ("", "<e>")])
def test_eos_is_not_doubled_where_the_text_has_it(text: str, expected: str) -> None:
    render = Renderer(CHATS["tail"], style=AS_TEXT)
    assert CHATS["tail"].decode(render.completion_ids("say:", text)) == expected
    assert CHATS["tail"].decode(render.whole_ids(text)) == expected


def test_an_eos_before_more_text_is_not_the_end() -> None:
    assert CHATS["tail"].decode(Renderer(CHATS["tail"]).whole_ids("a<e>b")) == "a<e>b<e>"


def test_a_template_without_an_end_gets_eos() -> None:
    render = Renderer(tokenizer(NO_END))
    ids = render.completion_ids(user("a"), agent("b"))
    assert render.tokenizer.decode(ids) == "b\n<e>"
    assert render.tokenizer.decode(render.whole_ids(user("a") + agent("b"))).endswith("b\n<e>")
    assert render.tail == []
    assert render.scored_ids(user("a"), ids) == render.prompt_ids(user("a")) + ids


def test_any_of_the_models_ends_ends_a_completion() -> None:
    made = tokenizer(OTHER_END)
    turn = made.convert_tokens_to_ids("<turn>")
    render = Renderer(made, [turn, made.eos_token_id])
    assert render.eos_ids == (made.eos_token_id, turn)
    ids = render.completion_ids(user("a"), agent("b"))
    assert made.decode(ids) == "b<turn>\n"
    assert render.ended(ids[:-1]) and not render.ended(ids)
    assert made.decode(render.tail) == "\n"
    assert render.scored_ids(user("a"), ids[:-1]) == render.prompt_ids(user("a")) + ids


def test_an_unknown_end_is_followed_by_eos() -> None:
    render = Renderer(tokenizer(OTHER_END))
    assert render.tokenizer.decode(render.completion_ids(user("a"), agent("b"))) == "b<turn>\n<e>"


def test_an_answer_without_the_reasoning_that_the_template_opens_is_refused() -> None:
    render = Renderer(tokenizer(THINKING))
    with pytest.raises(RowRefused, match="opens <think> for an answer that has no reasoning"):
        render.completion_ids(user("a"), agent("b"))
    with pytest.raises(RowRefused, match="opens <think>"):
        render.completion_ids(user("a"), agent("b") + user("c") + agent("d"))


def test_an_eos_after_the_end_of_the_turn_belongs_to_the_tail() -> None:
    """Like Phi-3's template: a turn ends with one EOS, the chat with another, and a policy stops at the first."""
    two = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}"
    made = tokenizer(two + "<s>assistant\n{% else %}<x>{% endif %}")
    made.add_special_tokens({"additional_special_tokens": ["<x>"]})
    render = Renderer(made, [made.convert_tokens_to_ids("<x>")])
    ids = render.completion_ids(user("a"), agent("b"))
    assert made.decode(ids) == "b<e><x>"
    assert render.scored_ids(user("a"), ids[:-1]) == render.prompt_ids(user("a")) + ids


@pytest.mark.parametrize("made", [CHATS["coffee"], CHATS["tail"], tokenizer(MARKED)], ids=["coffee", "tail", "marked"])
def test_only_what_the_assistant_writes_is_learned(made: Any) -> None:
    messages = user("a") + agent("bc") + user("d") + agent("e")
    row = of_demonstration(Renderer(made), Demonstration(None, messages))
    kept = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert made.decode(kept, skip_special_tokens=True) == "bce"
    assert kept.count(made.eos_token_id) == 2 and kept[-1] == made.eos_token_id


def test_text_has_no_special_tokens() -> None:
    render = Renderer(CHATS["tail"])
    assert render.text(render.completion_ids(user("a"), agent("b ü"))) == "b ü\n"
    assert render.text([]) == ""


def test_conversations_without_a_template_are_an_error() -> None:
    render = Renderer(tokenizer(None))
    assert not render.chat
    with pytest.raises(
        PerlError, match="has no chat template, but the data contains conversations\nHint: use an instruct"
    ):
        render.prompt_ids(user("a"))


def test_a_template_that_refuses_the_messages_is_an_error() -> None:
    render = Renderer(tokenizer("{{ raise_exception('only users may speak') }}"))
    with pytest.raises(PerlError, match=r"The chat template can't render .*: only users may speak"):
        render.prompt_ids(user("a"))


def test_a_tokenizer_without_eos_is_an_error() -> None:
    with pytest.raises(PerlError, match="has no EOS token, with which a completion ends\nHint: use a model"):
        Renderer(tokenizer(CHATML, eos=None))


def test_what_stages_share_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    render, calls, original = Renderer(CHATS["tail"]), [], Chat._rendered

    def counted(self: Chat, messages: Any, *more: Any) -> Any:
        calls.append(messages)
        return original(self, messages, *more)

    monkeypatch.setattr(Chat, "_rendered", counted)
    pair = render.rendered(Preference(user("a"), agent("b"), agent("c")))
    before = len(calls)
    assert render.rendered(Demonstration(user("a"), agent("b")))[0] == pair[0]
    assert render.prompt_ids(user("a")) == pair[0][0] and len(calls) == before
    monkeypatch.setattr(chat, "LATEST", 1)
    assert render.rendered(Demonstration(user("a"), agent("d")))[0][0] == pair[0][0]
    assert render.template._latest == {} and render.template._kept == 0
