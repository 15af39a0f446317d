"""Rows under every chat template that trl packages: exactly what the template renders, or refused by name."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perlcli.data import Demonstration, Preference, Prompt, Renderer
from perlcli.data.chat import RowRefused, Style
from perlcli.data.dialogs import VARIANT
from perlcli.data.render import IGNORED, of_demonstration, of_preference, of_prompt

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
QUICK = [
    "qwen3",
    "qwen3_5_think",
    "qwen3_8",
    "llama3_2",
    "gptoss",
    "phi3",
    "deepseek_r1_distill",
    "gemma4_v5",
    "glm4moe",
]
IMAGES = {"idefics3", "llava_next", "smolvlm"}  # they read content as a list of parts
OPENS = {name for name in NAMES if name.startswith(("nemotron", "qwen3_5_think", "qwen3_6", "qwen3_8", "deepseek"))}
SPECIAL = re.compile("<\\|?[\\w▁]+\\|?>|<\uff5c[\\w▁]+\uff5c>|</think>|\\[/?\\w+\\]")
ENDS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<\uff5cend▁of▁sentence\uff5c>",
    "<|eot|>",
]
ENDS += ["<|END_OF_TURN_TOKEN|>", "<end_of_utterance>"]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "today's", "parameters": CITY}}]
Messages = list[dict[str, Any]]


def say(role: str, content: str | None, **more: Any) -> Messages:
    return [{"role": role, "content": content, **more}]


def ask(content: str) -> Messages:
    return say("user", content)


def answer(content: str | None, **more: Any) -> Messages:
    return say("assistant", content, **more)


def thought(content: str, reasoning: str) -> Messages:
    return answer(f"<think>\n{reasoning}\n</think>\n\n{content}")


# Prompt and completion; for each answer that is learned, the texts in it; and what is passed to the template.
CASES: dict[str, tuple[Messages | None, Messages, list[list[str]], dict[str, Any]]] = {
    "plain": (ask("Q1"), answer("A1"), [["A1"]], {}),
    "reasoning_content": (ask("Q1"), answer("A1", reasoning_content="R1"), [["R1", "A1"]], {}),
    "think": (ask("Q1"), thought("A1", "R1"), [["R1", "A1"]], {}),
    "system": (say("system", "S1") + ask("Q1"), answer("A1"), [["A1"]], {}),
    "turns": (ask("Q1") + answer("B1") + ask("Q2"), answer("A2"), [["A2"]], {}),
    "thoughts": (ask("Q1") + thought("B1", "R1") + ask("Q2"), thought("A2", "R2"), [["R2", "A2"]], {}),
    "after": (ask("Q1"), answer("A1") + ask("Q2") + answer("A2"), [["A1"], ["A2"]], {}),
    "messages": (None, ask("Q1") + answer("A1") + ask("Q2") + answer("A2"), [["A1"], ["A2"]], {}),
    "reasoned": (None, ask("Q1") + thought("A1", "R1") + ask("Q2") + thought("A2", "R2"), [["R1", "A1"], ["A2"]], {}),
    "call": (ask("Q1"), answer(None, tool_calls=CALLS), [["weather", "Paris"]], {"tools": TOOLS}),
    "tools": (
        ask("Q1"),
        answer(None, tool_calls=CALLS) + say("tool", "22", name="weather") + answer("A2"),
        [["weather", "Paris"], ["A2"]],
        {"tools": TOOLS},
    ),
    "prefill": (ask("Q1") + answer("So "), answer("A1"), [["A1"]], {}),
}


def no_thinking(template: dict[str, Any]) -> dict[str, Any]:
    return {**template, "enable_thinking": False}


@cache
def tokenizer(name: str) -> Any:
    """A byte-level tokenizer with the template's own tokens, in which two newlines are one token, as in Qwen's."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = sorted({"<pad>", "<s>", "<|endoftext|>", *SPECIAL.findall(template)})
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [("Ċ", "Ċ")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    end = next((end for end in ENDS if end in special), "<|endoftext|>")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=end, pad_token="<pad>")
    made.chat_template = template
    return made


def rendered(made: Any, messages: Messages, template: dict[str, Any], **flags: Any) -> list[int]:
    return list(made.apply_chat_template(messages, return_dict=True, **template, **flags)["input_ids"])


def runs(row: dict[str, Any]) -> list[list[int]]:
    """The stretches of tokens that are learned."""
    found: list[list[int]] = []
    before = IGNORED
    for label in row["labels"]:
        if label != IGNORED:
            found += [[]] if before == IGNORED else []
            found[-1].append(label)
        before = label
    return found


def check(name: str, case: str, *, off: bool = False) -> str:
    """Render a case; what was not exact, if it was refused, in its words. Fails if it is neither."""
    made = tokenizer(name)
    prompt, completion, learned, template = CASES[case]
    template = no_thinking(template) if off else template
    render = Renderer(made)
    row = Demonstration(prompt, completion, template)
    try:
        columns = of_demonstration(render, row)
    except RowRefused as refused:
        assert refused.hint
        return refused.problem
    ids, flags = columns["input_ids"], {}
    if VARIANT in render.findings:
        flags["chat_template"] = render.template.training_source
    messages = [*(prompt or []), *completion]
    if case == "prefill":
        messages = ask("Q1") + answer("So A1")
        given = rendered(made, prompt, template, continue_final_message=True)
    else:
        given = rendered(made, prompt, template, add_generation_prompt=True) if prompt else []
    whole = rendered(made, messages, template, **flags)
    assert ids in (whole, [*whole, made.eos_token_id])
    assert ids[: len(given)] == given == render.prompt_ids(prompt, template) if prompt else not given
    found = runs(columns)
    assert len(found) == len(learned)
    for run, texts in zip(found, learned, strict=True):
        text = made.decode(run)
        assert all(part in text for part in texts)
        assert not re.search("Q1|Q2|S1|B1|22", text)
    assert made.eos_token_id in found[-1]  # so that a policy learns to stop
    assert (
        render.prompt_ids(prompt, template) == of_prompt(render, Prompt(prompt, template=template))["ids"]
        if prompt
        else True
    )
    both = of_preference(render, Preference(prompt, completion, completion, template=template))
    assert both["chosen_ids"] == ids  # a reward model reads what is learned
    return ""


def check_all(name: str) -> dict[str, str]:
    return {case: check(name, case) for case in CASES} | {f"{case} off": check(name, case, off=True) for case in CASES}


def check_template(name: str) -> None:
    faults = check_all(name)
    if name in IMAGES:
        return
    assert bool(faults["plain"]) == bool(faults["turns"]) == (name in OPENS)
    assert bool(faults["plain off"]) == name.startswith("deepseek")
    assert bool(faults["think"]) == (name in ("qwen3_5_nothink", "qwen3_8", "deepseekv3"))
    assert not faults["prefill"]
    no_calls = ("gemma", "gemma3", "llama3", "lfm2", "qwen2_5_vl")
    assert bool(faults["call"]) == (name in OPENS or name.startswith(("cohere", "phi3")) or name in no_calls)
    if name not in OPENS:
        assert bool(faults["messages"]) == bool(faults["after"]) == (name == "qwen3_5_nothink")


@pytest.mark.parametrize("name", QUICK)
def test_a_row_is_exactly_what_the_template_renders_or_refused(name: str) -> None:
    check_template(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_every_packaged_template_too(name: str) -> None:
    check_template(name)


@pytest.mark.parametrize(
    ("name", "case", "problem", "hint"),
    [
        ("qwen3_5_think", "plain", "opens <think> for an answer that has no reasoning", '{"enable_thinking": false}'),
        ("qwen3_8", "think", "opens a <think> block of its own", "reasoning_content"),
        ("deepseek_r1_distill", "reasoning_content", "drops the reasoning", "into the content, as <think>…</think>"),
        ("llama3_2", "reasoning_content", "does not render the reasoning of the answer, 'R1'", "into the content"),
        ("qwen3", "reasoned", "does not render the reasoning of the answer, 'R1'", "--loss-on last"),
        ("llama3", "call", "does not render tool_calls", "another --chat-template"),
        ("gemma", "system", "System role not supported", "another --chat-template"),
    ],
)
def test_a_refusal_says_what_to_set(name: str, case: str, problem: str, hint: str) -> None:
    prompt, completion, _, template = CASES[case]
    with pytest.raises(RowRefused) as caught:
        of_demonstration(Renderer(tokenizer(name)), Demonstration(prompt, completion, template))
    assert problem in caught.value.problem and hint in caught.value.hint


@pytest.mark.parametrize(("name", "problem"), [("llama3", "tool_calls"), ("llama3_1", None)])
def test_a_prompt_that_the_template_does_not_render_in_full_is_refused(name: str, problem: str | None) -> None:
    _, said, _, template = CASES["tools"]
    row = Prompt(ask("Q1") + said[:2], template=template)
    if problem is None:
        assert of_prompt(Renderer(tokenizer(name)), row)["ids"]
        return
    with pytest.raises(RowRefused, match=f"does not render {problem}"):
        of_prompt(Renderer(tokenizer(name)), row)


def test_reasoning_that_a_closed_block_would_follow_is_refused_both_ways() -> None:
    render = Renderer(tokenizer("qwen3_8"), style=Style(options={"enable_thinking": False}))
    with pytest.raises(RowRefused, match="opens a <think> block of its own"):
        render.completion_ids(ask("Q1"), thought("A1", "R1"))
    assert render.completion_ids(ask("Q1"), answer("A1"))
    with pytest.raises(RowRefused, match="closes <think> before an answer that has reasoning"):
        render.completion_ids(ask("Q1"), answer("A1", reasoning_content="R1"))


def test_a_rows_own_variables_come_before_those_of_the_run() -> None:
    made = tokenizer("qwen3_5_think")
    render = Renderer(made, style=Style(options={"enable_thinking": False}))
    off, on = (made.decode(render.prompt_ids(ask("Q1"), own)) for own in ({}, {"enable_thinking": True}))
    assert off.endswith("</think>\n\n") and on.endswith("<think>\n")


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_a_template_that_prints_the_date_prints_the_runs(name: str) -> None:
    made = tokenizer(name)
    texts = [
        made.decode(Renderer(made, style=Style(date=day)).prompt_ids(ask("Q1"))) for day in ("2024-03-05", "2025-01-01")
    ]
    assert re.search("2024-03-05|05 Mar 2024", texts[0]) and re.search("2025-01-01|01 Jan 2025", texts[1])
    learned = Renderer(made, style=Style(date="2024-03-05")).whole_ids(ask("Q1") + answer("A1"))
    assert made.decode(learned).startswith(texts[0])


def test_a_date_whose_form_the_template_computes_is_the_runs() -> None:
    made = tokenizer("qwen2_5")
    made.chat_template = "{% set form = '%-d' ~ ' %b' %}{{ strftime_now(form) if strftime_now is defined }}\n" + str(
        made.chat_template
    )
    ids = Renderer(made, style=Style(date="2024-03-05")).prompt_ids(ask("Q1"))
    assert made.decode(ids).startswith("5 Mar<|im_start|>")


def test_messages_with_weight_0_are_not_learned() -> None:
    made = tokenizer("llama3_2")
    talk = ask("Q1") + answer("A1", weight=0) + ask("Q2") + answer("A2", weight=1)
    found = {}
    for loss_on in ("assistant", "last", "all"):
        row = of_demonstration(Renderer(made), Demonstration(None, talk), loss_on=loss_on)  # type: ignore[arg-type]
        found[loss_on] = [made.decode(run) for run in runs(row)]
    assert found["assistant"] == found["last"] == ["A2<|eot_id|>"]
    assert len(found["all"]) == 2 and found["all"][0].endswith(
        "Q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert row["input_ids"] == rendered(made, ask("Q1") + answer("A1") + ask("Q2") + answer("A2"), {})


def test_an_empty_answer_is_not_learned() -> None:
    made = tokenizer("llama3_2")
    for blank in ("", " \n", None):
        talk = ask("Q1") + answer(blank) + ask("Q2") + answer("A2")
        with pytest.raises(RowRefused, match="An assistant message is empty"):
            of_demonstration(Renderer(made), Demonstration(None, talk))
        found = runs(of_demonstration(Renderer(made), Demonstration(None, talk), loss_on="last"))
        assert [made.decode(run) for run in found] == ["A2<|eot_id|>"]


def test_the_last_answer_alone_can_be_learned() -> None:
    made = tokenizer("qwen3_5_nothink")
    row = Demonstration(None, ask("Q1") + answer("A1") + ask("Q2") + answer("A2"))
    with pytest.raises(RowRefused, match="renders the answer 'A1' differently once the conversation goes on"):
        of_demonstration(Renderer(made), row)
    found = runs(of_demonstration(Renderer(made), row, loss_on="last"))
    assert [made.decode(run) for run in found] == ["A2<|im_end|>"]


def test_pairs_that_differ_in_a_call_differ_in_their_tokens() -> None:
    made = tokenizer("qwen3")
    rome = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    row = Preference(
        ask("Q1"), answer(None, tool_calls=CALLS), answer(None, tool_calls=rome), template={"tools": TOOLS}
    )
    both = of_preference(Renderer(made), row)
    assert "Paris" in made.decode(both["chosen_ids"]) and "Rome" in made.decode(both["rejected_ids"])
    assert "today's" in made.decode(both["chosen_ids"])


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}], ids=["text", "object"])
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss", "gemma4"])
def test_arguments_of_calls_may_be_text_or_objects(name: str, arguments: Any) -> None:
    made = tokenizer(name)
    calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    ids = Renderer(made).completion_ids(ask("Q1"), answer(None, tool_calls=calls))
    assert "\\" not in made.decode(ids) and "Paris" in made.decode(ids)


def test_a_second_call_that_the_template_leaves_out_is_refused() -> None:
    with pytest.raises(RowRefused, match="does not render more than one of the tool_calls of a message"):
        Renderer(tokenizer("gptoss")).completion_ids(ask("Q1"), answer(None, tool_calls=CALLS * 2))


def test_what_transformers_needs_for_itself_is_refused() -> None:
    with pytest.raises(RowRefused, match="chat_template_kwargs can't set tokenize"):
        Renderer(tokenizer("qwen3")).prompt_ids(ask("Q1"), {"tokenize": True})


def test_an_answer_whose_first_newline_merges_is_encoded_as_a_policy_writes_it() -> None:
    made = tokenizer("qwen2_5")
    render = Renderer(made)
    (pair,) = render.rendered(Demonstration(ask("Q1"), answer("\nA1")))
    assert pair[0] == Renderer(made).prompt_ids(ask("Q1"))
    assert made.decode([*pair[0], *pair[1]]) == made.decode(rendered(made, ask("Q1") + answer("\nA1"), {}))
    assert render.findings == [
        "the answer's first characters are encoded apart from the prompt, as a policy would write them"
    ]


# What a reward reads of what a policy wrote


def test_a_policy_that_ends_with_another_eos_gets_the_templates_end() -> None:
    made = tokenizer("llama3_2")
    other = made.convert_tokens_to_ids("<|endoftext|>")
    render = Renderer(made, [other])
    start, trained = render.rendered(Demonstration(ask("Q1"), answer("A1")))[0]
    written = trained[:-1]
    assert render.scored_ids(ask("Q1"), [*written, other]) == start + trained
    assert render.scored_ids(ask("Q1"), trained) == start + trained
    assert render.scored_ids(ask("Q1"), written) == start + written  # cut off


def test_the_end_of_a_call_is_kept() -> None:
    made = tokenizer("gptoss")
    call = made.convert_tokens_to_ids("<|call|>")
    render = Renderer(made, [call])
    start, trained = render.rendered(Demonstration(ask("Q1"), answer(None, tool_calls=CALLS)))[0]
    assert trained[-1] == call
    assert render.scored_ids(ask("Q1"), trained) == start + trained


def test_a_text_ends_with_the_tokenizers_eos() -> None:
    made = tokenizer("llama3_2")
    other = made.convert_tokens_to_ids("<|endoftext|>")
    render = Renderer(made, [other], Style(chat=False))
    assert render.scored_ids("say:", [*made("b")["input_ids"], other])[-1] == made.eos_token_id


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill", "llama3_2"])
def test_what_another_reward_model_reads_is_its_own_rendering(name: str) -> None:
    made = tokenizer(name)
    render = Renderer(made)
    whole = rendered(made, ask("Q1") + answer("A1"), {})
    assert render.read_ids(ask("Q1"), "A1") == render.read_ids("Q1", "A1") == whole
    cut = render.read_ids(ask("Q1"), "A1", ended=False)
    assert whole[: len(cut)] == cut and made.decode(cut).endswith("A1")


# Text rows


def test_text_rows_become_turns_unless_they_are_joined() -> None:
    made = tokenizer("llama3_2")
    turns = of_preference(Renderer(made), Preference("Q1", "A1", "A2"))
    assert turns == of_preference(Renderer(made), Preference(ask("Q1"), answer("A1"), answer("A2")))
    joined = of_preference(Renderer(made, style=Style(chat=False)), Preference("Q1", "A1", "A2"))
    assert made.decode(joined["chosen_ids"]) == "Q1A1<|eot_id|>"
    assert of_prompt(Renderer(made), Prompt("Q1"))["ids"] == rendered(made, ask("Q1"), {}, add_generation_prompt=True)


def test_a_prompt_that_is_rendered_already_is_refused() -> None:
    made = tokenizer("qwen2_5")
    text = made.decode(rendered(made, ask("Q1"), {}, add_generation_prompt=True))
    with pytest.raises(RowRefused, match=r"has the chat template's own tokens, such as .*\nHint: --no-chat"):
        Renderer(made).prompt_ids(text)
    assert Renderer(made).prompt_ids("Wrap your reasoning in <think> tags")
    assert made.decode(Renderer(made, style=Style(chat=False)).prompt_ids(text)) == text


def test_the_report_says_how_rows_are_rendered() -> None:
    made, bare = tokenizer("qwen2_5"), Renderer(tokenizer("qwen2_5"), style=Style(chat=False))
    assert "--no-chat joins the text" in Renderer(made).how(Demonstration("Q1", "A1"))
    assert "--chat makes them turns" in bare.how(Demonstration("Q1", "A1"))
    assert bare.how(Demonstration(ask("Q1"), answer("A1"))) == "rendered by the model's chat template"
    assert Renderer(made).how(Demonstration(None, "A1")) == ""


def test_text_has_one_bos_and_a_prompt_no_eos() -> None:
    from tokenizers.processors import TemplateProcessing

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer("phi3").backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="<|endoftext|>",
    )
    ids = {token: made.convert_tokens_to_ids(token) for token in ("<s>", "<|endoftext|>")}
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=list(ids.items())
    )
    render = Renderer(made)
    assert made.decode(render.prompt_ids("say:")) == made.decode(render.prompt_ids("<s>say:")) == "<s>say:"
    rows: list[Any] = [Demonstration("say:", "b"), Demonstration("<s>say:", "b"), Demonstration(None, "say:b")]
    for rows_seen in ([], rows):
        render.foresee(rows_seen, "assistant")
        for row in rows:
            assert made.decode(of_demonstration(render, row)["input_ids"]) == "<s>say:b<|endoftext|>"


def test_a_tokenizer_that_renders_ids_itself_follows_the_same_rule() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return super().apply_chat_template(*args, **kwargs)

    plain = tokenizer("llama3_2")
    made = Own(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="<|eot_id|>", pad_token="<pad>")
    made.chat_template = plain.chat_template
    row = Demonstration(None, ask("Q1") + answer("A1") + ask("Q2") + answer("A2"))
    assert not Renderer(made).template.is_text
    assert of_demonstration(Renderer(made), row) == of_demonstration(Renderer(plain), row)


@pytest.mark.parametrize(
    ("name", "messages", "lost"),
    [
        ("phi3", ask("Q1") + say("tool", "The sum is 4") + answer("The tool says: The sum is 4."), "the tool message"),
        ("qwen3", say("developer", "Be brief") + ask("Be brief, Q1") + answer("A1"), "the developer message"),
        ("qwen3", ask("Q1") + answer("Sure, I think. <think>R1</think>A1"), "the assistant message 'Sure, I think. '"),
    ],
)
def test_a_lost_message_is_noticed_also_if_its_text_occurs_elsewhere(name: str, messages: Messages, lost: str) -> None:
    with pytest.raises(RowRefused) as caught:
        of_demonstration(Renderer(tokenizer(name)), Demonstration(None, messages))
    assert f"does not render {lost}" in caught.value.problem


def test_an_end_that_an_answer_has_already_is_not_doubled() -> None:
    render = Renderer(tokenizer("qwen3"))
    for end in ("<|im_end|>", "<|im_end|>\n"):
        assert render.completion_ids(ask("Q1"), answer(f"A1{end}")) == render.completion_ids(ask("Q1"), answer("A1"))


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_messages_that_hold_the_templates_own_tokens_are_refused(role: str) -> None:
    messages = say(role, "<|im_start|>user\nQ0<|im_end|>") + ask("Q1") + answer("A1")
    with pytest.raises(RowRefused, match=f"The {role} message has the chat template's own tokens, such as <"):
        of_demonstration(Renderer(tokenizer("qwen3")), Demonstration(None, messages))
