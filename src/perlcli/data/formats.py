"""The known formats, and how each is recognised by its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from perlcli.data.fields import BadField, is_missing, is_null
from perlcli.data.readers import annotated, compared, plain, published, ranked
from perlcli.data.readers.hh import is_hh
from perlcli.data.readers.labels import WORDS, spelled
from perlcli.data.readers.messages import ROLES, decoded
from perlcli.data.readers.reading import Reading
from perlcli.data.rows import Ranking, Raw, Row, Unjudged

ALL = frozenset({"sft", "reward", "rl"})
ANSWERS = frozenset({"sft", "rl"})


@dataclass(frozen=True)
class Format:
    """A format: its name and columns, the stages it serves, its reader, and what else distinguishes it from others. If
    `key` is set, adjacent rows with the same value in that column are read as one."""

    name: str
    columns: tuple[str, ...]
    uses: frozenset[str]
    read: Callable[[Raw, Reading], Row | Unjudged | Ranking | list[Row | Unjudged | Ranking]]
    what: str  # for the documentation
    is_it: Callable[[Raw], bool] = lambda raw: True
    key: str = ""


def _no_prompt(raw: Raw) -> bool:
    return raw.get("prompt") is None


def _has(*names: str) -> Callable[[Raw], bool]:
    """Whether a row has no prompt but a question under one of these names."""
    return lambda raw: _no_prompt(raw) and any(raw.get(name) is not None for name in names)


def _is_continued(raw: Raw) -> bool:
    """Whether chosen is an answer and not another complete conversation."""
    try:
        chosen = decoded(raw["chosen"], "chosen")
    except BadField:  # reported when the row is read
        return _no_prompt(raw)
    first = chosen[0] if isinstance(chosen, list) and chosen else chosen
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else "assistant"
    return _no_prompt(raw) and ROLES.get(str(role).lower()) not in ("system", "developer", "user")


def _is_judged(raw: Raw) -> bool:
    """Whether a conversation or an instruction has a thumb, or an empty column for it."""
    return "kto_tag" in raw or ("label" in raw and (is_missing(raw["label"]) or spelled(raw["label"]) in WORDS))


def _lists(name: str, *keys: str) -> Callable[[Raw], bool]:
    """Whether a column is a list of objects with these keys."""

    def is_it(raw: Raw) -> bool:
        items = raw[name]
        return isinstance(items, list) and bool(items) and isinstance(items[0], Mapping) and set(keys) <= set(items[0])

    return is_it


PAIR = ("chosen", "rejected")

# In the order in which they are tried: the first that fits is the format.
FORMATS = (
    Format(
        "hh",
        PAIR,
        ALL,
        published.read_hh,
        "Anthropic HH: texts of `\\n\\nHuman: …` and `\\n\\nAssistant: …`",
        lambda raw: "prompt" not in raw and is_hh(raw["chosen"]),
    ),
    Format(
        "openai-preferences",
        ("input", "preferred_output", "non_preferred_output"),
        ALL,
        plain.read_openai_pair,
        "OpenAI's preference fine-tuning",
    ),
    Format(
        "rewardbench-2",
        ("prompt", *PAIR, "num_correct"),
        ALL,
        compared.read_lists,
        "RewardBench 2: lists of chosen and rejected answers",
        compared.has_lists,
    ),
    Format(
        "rm-bench",
        ("prompt", *PAIR),
        ALL,
        compared.read_lists,
        "RM-Bench: lists of chosen and rejected answers",
        compared.has_lists,
    ),
    Format(
        "alpaca-pairs",
        ("instruction", *PAIR),
        ALL,
        plain.read_alpaca_pair,
        "LLaMA-Factory's preferences, alpaca: some with `input`, `system`, `history`",
        _no_prompt,
    ),
    Format(
        "argilla-pairs",
        ("instruction", "chosen_response", "rejected_response"),
        ALL,
        plain.read_alpaca_responses,
        "axolotl's `chatml.argilla`",
    ),
    Format(
        "sharegpt-pairs",
        ("conversations", *PAIR),
        ALL,
        plain.read_chat_pair,
        "LLaMA-Factory's preferences, sharegpt",
        _is_continued,
    ),
    Format(
        "chat-pairs",
        ("messages", *PAIR),
        ALL,
        plain.read_chat_pair,
        "axolotl's `chat_template.default`: messages and two that continue them",
        _is_continued,
    ),
    Format(
        "orca-pairs",
        PAIR,
        ALL,
        plain.read_question_pair,
        "Orca DPO, axolotl's `chatml.intel` and `chatml.icr`: `question` or `input`, some with `system`",
        _has("question", "input"),
    ),
    Format("pairs", PAIR, ALL, plain.read_pair, "preferences, with or without `prompt`; some with `margin`, `system`"),
    Format(
        "shp",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        ALL,
        published.read_shp,
        "Stanford Human Preferences, SHP-2; see `--shp-score-ratio`, `--shp-per-post`",
    ),
    Format(
        "summarize-from-feedback",
        ("info", "summaries", "choice"),
        ALL,
        published.read_comparison,
        "OpenAI's TL;DR comparisons",
    ),
    Format(
        "webgpt",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        ALL,
        compared.read_webgpt,
        "WebGPT's comparisons",
    ),
    Format(
        "helpsteer3",
        ("context", "response1", "response2", "overall_preference"),
        ALL,
        compared.read_helpsteer3,
        "HelpSteer3",
    ),
    Format(
        "helpsteer2-preference",
        ("prompt", "response_1", "response_2", "preference_strength"),
        ALL,
        compared.read_helpsteer2_preference,
        "the preferences of HelpSteer2",
    ),
    Format(
        "pku-saferlhf",
        ("prompt", "response_0", "response_1", "better_response_id"),
        ALL,
        compared.read_pku,
        "PKU-SafeRLHF; `--score-field safer_response_id` compares by safety",
    ),
    Format(
        "stack-exchange-paired",
        ("question", "response_j", "response_k"),
        ALL,
        compared.read_stack_pair,
        "Stack Exchange, paired",
    ),
    Format(
        "stack-exchange",
        ("question", "answers"),
        ALL,
        ranked.read_stack,
        "Stack Exchange preferences: a ranking by `pm_score`",
        _lists("answers", "text"),
    ),
    Format(
        "judgebench", ("question", "response_A", "response_B", "label"), ALL, compared.read_judgebench, "JudgeBench"
    ),
    Format(
        "arena",
        ("conversation_a", "conversation_b", "winner"),
        ALL,
        compared.read_arena,
        "Chatbot Arena and MT-Bench judgements",
    ),
    Format(
        "arena-55k",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        ALL,
        compared.read_arena_55k,
        "LMSYS's 55k battles",
    ),
    Format("nectar", ("prompt", "answers"), ALL, ranked.read_nectar, "Nectar: a ranking", _lists("answers", "answer")),
    Format(
        "ultrafeedback",
        ("instruction", "completions"),
        ALL,
        ranked.read_ultrafeedback,
        "UltraFeedback: a ranking by `fine-grained_score`, or by `--score-field`",
    ),
    Format(
        "helpsteer2",
        ("prompt", "response", "helpfulness"),
        ALL,
        ranked.read_helpsteer2,
        "HelpSteer, HelpSteer2: a ranking by `helpfulness`, or by `--score-field`",
        key="prompt",
    ),
    Format(
        "argilla",
        ("fields", "responses"),
        ALL,
        annotated.read_argilla,
        "Argilla's records: answers that were ranked, chosen or labelled",
    ),
    Format(
        "argilla-hub",
        (),
        ALL,
        annotated.read_flat_argilla,
        "Argilla's export to the Hub: `QUESTION.responses`",
        annotated.is_flat_argilla,
    ),
    Format(
        "label-studio",
        ("data", "annotations"),
        ALL,
        annotated.read_label_studio,
        "Label Studio's JSON: answers that were compared or labelled",
    ),
    Format(
        "label-studio-min",
        ("annotation_id", "annotator"),
        ALL,
        annotated.read_label_studio_min,
        "Label Studio's JSON_MIN",
    ),
    Format(
        "verdicts",
        (),
        ALL,
        compared.read_verdict,
        "two answers and the better one: `response_a`, `response_b`, `winner`, or names like these",
        compared.has_verdict,
    ),
    Format(
        "taskmaster",
        ("context", "generation", "reward"),
        ALL,
        published.read_taskmaster,
        "Taskmaster `reward_*.json`: thumbs on the agent's next action",
    ),
    Format("thumbs", ("prompt", "completion", "label"), ALL, plain.read_thumb, "thumbs: 0/1, true/false, up/down …"),
    Format(
        "alpaca-thumbs",
        ("instruction", "output"),
        ALL,
        plain.read_alpaca_thumb,
        "LLaMA-Factory's KTO, alpaca: with a `kto_tag` or `label`",
        _is_judged,
    ),
    Format(
        "sharegpt-thumbs",
        ("conversations",),
        ALL,
        plain.read_chat_thumb,
        "LLaMA-Factory's KTO, sharegpt: the last turn has a `kto_tag` or `label`",
        _is_judged,
    ),
    Format(
        "chat-thumbs",
        ("messages",),
        ALL,
        plain.read_chat_thumb,
        "conversations whose last turn has a `kto_tag` or `label`",
        _is_judged,
    ),
    Format(
        "orca-thumbs",
        ("completion", "label"),
        ALL,
        plain.read_question_thumb,
        "axolotl's KTO: `question`, `instruction` or `input`, some with `system`",
        _has("question", "input", "instruction"),
    ),
    Format(
        "scored",
        ("prompt", "completion", "score"),
        ALL,
        ranked.read_scored,
        "completions with a score: adjacent rows with the same prompt are a ranking",
        key="prompt",
    ),
    Format(
        "android-control",
        ("action",),
        ALL,
        published.read_android,
        "AndroidControl steps as text: `goal` or `instruction`, `history`, `screen`, `label`",
        lambda raw: "goal" in raw or "instruction" in raw,
    ),
    Format("prompt-completion", ("prompt", "completion"), ANSWERS, plain.read_demonstration, "demonstrations"),
    Format("messages", ("messages",), ANSWERS, plain.read_messages, "conversations, some with `tools`; OpenAI's too"),
    Format(
        "sharegpt",
        ("conversations",),
        ANSWERS,
        plain.read_sharegpt,
        "conversations with `from` and `value`, some with `system`, `tools`",
    ),
    Format(
        "taskmaster-dialogs",
        ("utterances",),
        ANSWERS,
        published.read_dialog,
        "Taskmaster dialogs: each action of the agent becomes a row",
    ),
    Format(
        "alpaca",
        ("instruction", "output"),
        ANSWERS,
        plain.read_alpaca,
        "instructions, some with `input`, `system`, `history`",
    ),
    Format("dolly", ("instruction", "context", "response"), ANSWERS, plain.read_dolly, "Databricks Dolly"),
    Format("orca", ("question", "response"), ANSWERS, plain.read_orca, "OpenOrca, some with `system_prompt`"),
    Format("tldr", ("subreddit", "title", "post"), ANSWERS, published.read_tldr, "Reddit posts; `summary` for sft"),
    Format(
        "prompts",
        ("prompt",),
        frozenset({"rl"}),
        plain.read_prompt,
        "prompts; other columns are passed to reward functions",
    ),
    Format("text", ("text",), frozenset({"sft"}), plain.read_text, "complete texts"),
)
NAMES = {known.name: known for known in FORMATS}


def detect(raw: Raw, use: str | None = None) -> Format | None:
    """The format of a row, by its columns; None if none fits. For a use, columns that are null decide only if the
    others don't say enough: tables made of several sources have them."""
    if use is not None:
        known = _fitting({name: value for name, value in raw.items() if not is_null(value)})
        if known is not None and use in known.uses:
            return known
    return _fitting(raw)


def _fitting(raw: Raw) -> Format | None:
    return next((known for known in FORMATS if set(known.columns) <= set(raw) and known.is_it(raw)), None)


def named(raw: Raw, name: str | None) -> Format | None:
    """The format with this name, else that of a row."""
    return detect(raw) if name is None else NAMES[name]
