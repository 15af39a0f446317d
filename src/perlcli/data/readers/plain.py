"""Reads the formats of trainers: TRL's (https://huggingface.co/docs/trl/dataset_formats), and those of LLaMA-Factory
(https://github.com/hiyouga/LLaMA-Factory/tree/main/data), axolotl (https://docs.axolotl.ai/docs/rlhf.html) and OpenAI
(https://platform.openai.com/docs/guides/fine-tuning)."""

from __future__ import annotations

from perlcli.data import fields
from perlcli.data.fields import BadField
from perlcli.data.readers.messages import content, conversation, template, turn, turns
from perlcli.data.readers.reading import (
    TIED,
    Reading,
    answer_of,
    asked,
    chatted,
    continued,
    opened,
    prompt_of,
    question,
    reply,
    system_of,
    thumb,
    with_system,
)
from perlcli.data.rows import Content, Demonstration, Message, Preference, Prompt, Raw, Row, Thumb, Unjudged

# The scores of the two answers of a pair, in the datasets that have them: equal ones are a tie.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
# The columns that only say whether a pair is a tie; of `status` also whether its answers were swapped since.
TIES = frozenset({"status", *(name for names in SCORES for name in names)})
STATUSES = ("tie", "unchanged", "swapped")

ANSWERS = ("completion", "response", "answer", "output")  # columns with the answer to the messages of a row

# --- TRL


def read_pair(raw: Raw, how: Reading) -> Preference | Unjudged:
    """A preference; if the row has no prompt, the turns that both conversations start with are the prompt."""
    chosen, rejected = answer_of(raw, "chosen"), answer_of(raw, "rejected")
    given = prompt_of(raw, chosen, rejected)
    if given is not None:
        answers = (chatted(chosen, how), chatted(rejected, how))
        prompt, better, worse = continued(question(given, how), *answers)
        if isinstance(prompt, str) or isinstance(better, str) or isinstance(worse, str) or better == answers[0]:
            return _judged(raw, how, prompt, better, worse)
        chosen, rejected = [*prompt, *better], [*prompt, *worse]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadField("text and messages in the same row")
    if isinstance(chosen, str) or isinstance(rejected, str):
        return _preference(raw, None, chosen, rejected)
    start = fields.shared(chosen[:-1], rejected[:-1])
    while start and chosen[start - 1]["role"] == "assistant":
        start -= 1  # a completion starts with the assistant's turn
    if start:
        return _judged(raw, how, chosen[:start], chosen[start:], rejected[start:])
    system = system_of(raw)
    return _preference(raw, [{"role": "system", "content": system}] if system else None, chosen, rejected)


def _judged(raw: Raw, how: Reading, question: Content, chosen: Content, rejected: Content) -> Preference | Unjudged:
    """The pair with the question as the row's other columns open it, and answers of the same kind."""
    prompt = opened(raw, question, how)
    if isinstance(question, str) and not isinstance(prompt, str):
        chosen, rejected = reply(chosen, how), reply(rejected, how)
    return _preference(raw, prompt, chosen, rejected)


def _preference(raw: Raw, prompt: Content | None, chosen: Content, rejected: Content) -> Preference | Unjudged:
    """The pair with its margin; a tie if the row says so."""
    options = template(raw)
    if prompt is not None:
        prompt, chosen, rejected = continued(prompt, chosen, rejected)
    if _is_tied(raw):
        return Unjudged(prompt, TIED, options)
    margin = None if fields.is_missing(raw.get("margin")) else fields.number(raw, "margin")
    return Preference(prompt, chosen, rejected, margin, options)


def _is_tied(raw: Raw) -> bool:
    return raw.get("status") == "tie" or any(one == other for _, (one, other) in _scores(raw))


def _scores(raw: Raw) -> list[tuple[tuple[str, str], tuple[object, object]]]:
    """The names of a pair's scores that the row has, and their values: numbers where they can be read as numbers."""
    found = []
    for names in SCORES:
        one, other = (raw.get(name) for name in names)
        if fields.is_missing(one) or fields.is_missing(other):
            continue
        numbers = fields.number_of(one), fields.number_of(other)
        found.append((names, (one, other) if None in numbers else numbers))
    return found


def strange_status(raw: Raw) -> str:
    """The status of a pair if it is text of unknown meaning; else empty."""
    status = raw.get("status")
    return status if isinstance(status, str) and status.strip() not in ("", *STATUSES) else ""


def contradicted(raw: Raw) -> tuple[str, str] | None:
    """The names of two scores of which the one of the chosen answer is lower; None if there are none."""
    for names, (one, other) in _scores(raw):
        if isinstance(one, float) and isinstance(other, float) and one < other:
            return names
    return None


def read_thumb(raw: Raw, how: Reading) -> Thumb | Unjudged:
    """A completion with its label."""
    read = read_demonstration(raw, how)
    if read.prompt is None and not isinstance(read.completion, str):
        *prompt, answer = read.completion
        return thumb(prompt, [answer], raw, how, template=read.template)
    return thumb(read.prompt or "", read.completion, raw, how, template=read.template)


def read_demonstration(raw: Raw, how: Reading) -> Demonstration:
    """A prompt and the completion to imitate."""
    completion = answer_of(raw, "completion")
    found = prompt_of(raw, completion) if "prompt" in raw and raw["prompt"] is not None else content(raw, "prompt")
    if found is None and not isinstance(completion, str):
        return Demonstration(None, with_system(system_of(raw), completion), template(raw))
    given, completion = continued(question(found or "", how), completion)
    prompt = opened(raw, given, how)
    if isinstance(given, str) and not isinstance(prompt, str):
        completion = reply(completion, how)
    return Demonstration(prompt, completion, template(raw))


def read_messages(raw: Raw, how: Reading) -> Demonstration:
    """A complete conversation; or one that ends with the user, and the answer to it in a column of its own."""
    found = _conversation(raw)
    name = next((name for name in ANSWERS if name in raw), None)
    if found[-1]["role"] == "user" and name is not None:
        return Demonstration(found, _turn(raw, name), template(raw))
    return Demonstration(None, found, template(raw))


def read_text(raw: Raw, how: Reading) -> Row:
    """A complete text."""
    fields.text(raw, "text")
    return Demonstration(None, content(raw, "text"))


def read_prompt(raw: Raw, how: Reading) -> Row:
    """A prompt to answer."""
    return Prompt(opened(raw, question(content(raw, "prompt"), how), how), template=template(raw))


# --- Instructions: Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), and LLaMA-Factory's files like it

ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:"
)


def instruction(raw: Raw, how: Reading, given: str = "input") -> Content:
    """The instruction with its input: Alpaca's prompt as text, or one message in a chat."""
    task, more = fields.text(raw, "instruction"), fields.optional_text(raw, given)
    if how.chat:
        return opened(raw, asked(f"{task}\n\n{more}" if more else task, how), how)
    kind = ", paired with an input that provides further context" if more else ""
    shown = f"\n\n### Input:\n{more}" if more else ""
    return opened(raw, ALPACA.format(more=kind, instruction=task, input=shown), how)


def _response(raw: Raw, name: str, how: Reading) -> Content:
    """The answer in a field; as text it follows `### Response:` as it is."""
    answer = answer_of(raw, name)
    return reply(answer, how) if how.chat else answer


def _output(raw: Raw, name: str, how: Reading) -> Content:
    """An answer that must be text."""
    fields.optional_text(raw, name)
    return _response(raw, name, how)


def read_alpaca(raw: Raw, how: Reading) -> Demonstration:
    """An instruction and its output."""
    return Demonstration(instruction(raw, how), _output(raw, "output", how), template(raw))


def read_dolly(raw: Raw, how: Reading) -> Demonstration:
    """Databricks Dolly (https://huggingface.co/datasets/databricks/databricks-dolly-15k): `context` is the input."""
    return Demonstration(instruction(raw, how, "context"), _output(raw, "response", how), template(raw))


def read_alpaca_pair(raw: Raw, how: Reading) -> Preference | Unjudged:
    """An instruction with a better and a worse answer."""
    return _preference(raw, instruction(raw, how), _response(raw, "chosen", how), _response(raw, "rejected", how))


def read_alpaca_responses(raw: Raw, how: Reading) -> Preference | Unjudged:
    """The same with the column names of axolotl's chatml.argilla."""
    chosen, rejected = (_response(raw, name, how) for name in ("chosen_response", "rejected_response"))
    return _preference(raw, instruction(raw, how), chosen, rejected)


def read_alpaca_thumb(raw: Raw, how: Reading) -> Thumb | Unjudged:
    """An instruction whose output got a thumb."""
    return thumb(instruction(raw, how), _response(raw, "output", how), raw, how, _verdict(raw), template(raw))


# --- Questions with a system prompt, as in OpenOrca (https://huggingface.co/datasets/Open-Orca/OpenOrca) and
# Intel/orca_dpo_pairs, which axolotl calls chatml.intel, and chatml.icr with `input`


def _question(raw: Raw, how: Reading) -> Content:
    name = next(
        (name for name in ("question", "instruction", "input") if not fields.is_null(raw.get(name))), "question"
    )
    if name == "instruction":
        return instruction(raw, how)
    given = content(raw, name)
    return opened(raw, asked(given, how) if isinstance(given, str) else given, how)


def read_question_pair(raw: Raw, how: Reading) -> Preference | Unjudged:
    """A question with a better and a worse answer."""
    return _preference(raw, _question(raw, how), *(reply(answer_of(raw, name), how) for name in ("chosen", "rejected")))


def read_question_thumb(raw: Raw, how: Reading) -> Thumb | Unjudged:
    """A question whose answer got a thumb, as axolotl's KTO files have it."""
    return thumb(_question(raw, how), reply(answer_of(raw, "completion"), how), raw, how, template=template(raw))


def read_orca(raw: Raw, how: Reading) -> Demonstration:
    """A question with the answer to imitate."""
    return Demonstration(_question(raw, how), reply(answer_of(raw, "response"), how), template(raw))


# --- Conversations: ShareGPT's (as FastChat, axolotl and LLaMA-Factory read it), and OpenAI's


def _conversation(raw: Raw) -> list[Message]:
    """The conversation in `conversations` or `messages`, with the row's system prompt."""
    if "conversations" in raw:
        found = turns(raw)
    else:
        found = conversation(fields.need(raw, "messages", "a list of messages"), "messages")
    return with_system(system_of(raw), found)


def read_sharegpt(raw: Raw, how: Reading) -> Demonstration:
    """ShareGPT: `conversations` of turns with `from` and `value`."""
    return Demonstration(None, _conversation(raw), template(raw))


def read_chat_pair(raw: Raw, how: Reading) -> Preference | Unjudged:
    """A conversation and two messages that continue it."""
    return _preference(raw, _conversation(raw), _turn(raw, "chosen"), _turn(raw, "rejected"))


def _turn(raw: Raw, name: str) -> list[Message]:
    """An answer in a conversation, also if it is text."""
    answer = answer_of(raw, name)
    return turn(answer) if isinstance(answer, str) else answer


def read_chat_thumb(raw: Raw, how: Reading) -> Thumb | Unjudged:
    """A conversation whose last turn got a thumb."""
    found, name = _conversation(raw), _verdict(raw)
    answer = next((column for column in ANSWERS if column in raw), None)
    if found[-1]["role"] == "user" and answer is not None:
        found += _turn(raw, answer)
    if len(found) < 2 or found[-1]["role"] != "assistant":
        raise BadField(f"the conversation must end with the turn of the assistant that {name} is about")
    return thumb(found[:-1], found[-1:], raw, how, name, template(raw))


def _verdict(raw: Raw) -> str:
    """The column that has the thumb."""
    return "label" if fields.is_null(raw.get("kto_tag")) and "label" in raw else "kto_tag"


def read_openai_pair(raw: Raw, how: Reading) -> Preference | Unjudged:
    """OpenAI's preferences: the messages of `input`, continued by the preferred and the other output."""
    given = fields.mapping(raw, "input", "messages")
    try:
        prompt = conversation(fields.need(given, "messages", "a list of messages"), "messages")
        options = template(given)
    except BadField as fault:
        raise BadField(f"input: {fault}") from fault
    better, worse = (conversation(raw.get(name), name) for name in ("preferred_output", "non_preferred_output"))
    return Preference(prompt, better, worse, template=options)
