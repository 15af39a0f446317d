"""A row of every format, and what each stage makes of it, for the documentation."""

from __future__ import annotations

import json
from typing import Any

from perlcli.data.formats import NAMES, Format
from perlcli.data.loading import Intake
from perlcli.data.readers.ranked import together
from perlcli.data.rows import Content, Demonstration, Preference, Prompt, Raw, Row, SourceRow, text_of
from perlcli.settings import DataSettings
from perlcli.text import markdown_table, one_line

ASK: dict[str, Any] = {"role": "user", "content": "2+2?"}
TURN: dict[str, Any] = {"from": "human", "value": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
GPT, WRONG = {"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}
ORDER = {"role": "agent", "api": {"add": {"id": "latte"}}}
# The rows that are read together, of the formats that have a row for each answer; else one row.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "hh": [{"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}],
    "openai-preferences": [{"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}],
    "rewardbench-2": [{"prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "6"], "num_correct": 1}],
    "rm-bench": [{"prompt": "2+2?", "chosen": ["4"], "rejected": ["5"]}],
    "alpaca-pairs": [{"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5"}],
    "argilla-pairs": [{"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5"}],
    "sharegpt-pairs": [{"conversations": [TURN], "chosen": GPT, "rejected": WRONG}],
    "chat-pairs": [{"messages": [ASK], "chosen": GOOD, "rejected": BAD}],
    "orca-pairs": [{"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"}],
    "pairs": [{"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}],
    "shp": [{"history": "2+2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1}],
    "summarize-from-feedback": [
        {
            "info": {"subreddit": "math", "title": "Sums", "post": "2+2."},
            "summaries": [{"text": "4"}, {"text": "5"}],
            "choice": 0,
        }
    ],
    "webgpt": [{"question": {"full_text": "2+2?"}, "answer_0": "4", "answer_1": "5", "score_0": 1.0, "score_1": -1.0}],
    "helpsteer3": [{"context": [ASK], "response1": "4", "response2": "5", "overall_preference": -2}],
    "helpsteer2-preference": [{"prompt": "2+2?", "response_1": "4", "response_2": "5", "preference_strength": -2}],
    "pku-saferlhf": [{"prompt": "2+2?", "response_0": "4", "response_1": "5", "better_response_id": 0}],
    "stack-exchange-paired": [{"question": "2+2?", "response_j": "4", "response_k": "5"}],
    "stack-exchange": [{"question": "2+2?", "answers": [{"text": "4", "pm_score": 3}, {"text": "5", "pm_score": 0}]}],
    "judgebench": [{"question": "2+2?", "response_A": "4", "response_B": "5", "label": "A>B"}],
    "arena": [{"conversation_a": [ASK, GOOD], "conversation_b": [ASK, BAD], "winner": "model_a"}],
    "arena-55k": [
        {"prompt": '["2+2?"]', "response_a": '["4"]', "response_b": '["5"]', "winner_model_a": 1, "winner_model_b": 0}
    ],
    "verdicts": [{"prompt": "2+2?", "response_a": "4", "response_b": "5", "winner": "model_a"}],
    "nectar": [
        {
            "prompt": "\n\nHuman: 2+2?\n\nAssistant: ",
            "answers": [{"answer": "4", "rank": 1.0}, {"answer": "5", "rank": 2.0}],
        }
    ],
    "ultrafeedback": [
        {
            "instruction": "2+2?",
            "completions": [{"response": "4", "fine-grained_score": 5.0}, {"response": "5", "fine-grained_score": 1.5}],
        }
    ],
    "helpsteer2": [
        {"prompt": "2+2?", "response": "4", "helpfulness": 4},
        {"prompt": "2+2?", "response": "5", "helpfulness": 0},
    ],
    "argilla": [
        {
            "fields": {"prompt": "2+2?", "response-1": "4", "response-2": "5"},
            "responses": {"better": [{"value": "response-1"}]},
            "status": "completed",
        }
    ],
    "argilla-hub": [{"prompt": "2+2?", "response-1": "4", "response-2": "5", "better.responses": ["response-1"]}],
    "label-studio": [
        {
            "data": {"prompt": "2+2?", "answer1": "4", "answer2": "5"},
            "annotations": [{"result": [{"from_name": "better", "value": {"selected": "left"}}]}],
        }
    ],
    "label-studio-min": [
        {"prompt": "2+2?", "answer1": "4", "answer2": "5", "better": "left", "annotation_id": 1, "annotator": 1}
    ],
    "taskmaster": [
        {"context": json.dumps([{"role": "user", "text": "a latte"}]), "generation": json.dumps(ORDER), "reward": 1.0}
    ],
    "thumbs": [{"prompt": "2+2?", "completion": "4", "label": True}],
    "alpaca-thumbs": [{"instruction": "Add.", "input": "2+2", "output": "5", "kto_tag": False}],
    "sharegpt-thumbs": [{"conversations": [TURN, WRONG], "kto_tag": False}],
    "chat-thumbs": [{"messages": [ASK, GOOD], "label": "👍"}],
    "orca-thumbs": [{"system": "Be brief.", "question": "2+2?", "completion": "4", "label": True}],
    "scored": [
        {"prompt": "2+2?", "completion": "4", "score": 0.9},
        {"prompt": "2+2?", "completion": "5", "score": 0.1},
    ],
    "android-control": [{"goal": "Open Meet", "action": {"action_type": "open_app"}, "label": 1}],
    "prompt-completion": [{"prompt": "2+2?", "completion": "4"}],
    "messages": [{"messages": [ASK, GOOD]}],
    "sharegpt": [{"conversations": [TURN, GPT], "system": "Be brief."}],
    "taskmaster-dialogs": [
        {"utterances": [{"speaker": "user", "text": "hi"}, {"speaker": "assistant", "text": "hello"}]}
    ],
    "alpaca": [{"instruction": "Add.", "input": "2+2", "output": "4", "history": [["1+1", "2"]]}],
    "dolly": [{"instruction": "Add.", "context": "2+2", "response": "4"}],
    "orca": [{"system_prompt": "Be brief.", "question": "2+2?", "response": "4"}],
    "tldr": [{"subreddit": "math", "title": "Sums", "post": "2+2.", "summary": "4"}],
    "prompts": [{"prompt": "2+2?", "solution": "4"}],
    "text": [{"text": "2+2 is 4."}],
}


def joined(known: Format) -> Raw:
    """The example of a format as its reader gets it."""
    rows = EXAMPLES[known.name]
    return together(rows, known.key) if known.key else rows[0]


def made(known: Format, use: str) -> list[Row]:
    """What a stage makes of the example of a format; nothing if the format doesn't serve it."""
    if use not in known.uses:
        return []
    intake = Intake("x", use, "train", chat=True, options=DataSettings(data_format=None))
    rows = intake.take(1, SourceRow("x, row 1", joined(known), count=len(EXAMPLES[known.name])))
    intake.check_faults()
    return rows


def table() -> str:
    """All formats as a Markdown table: TRL's own first, then the others by name."""
    ordered = sorted(NAMES.values(), key=lambda known: (known.name not in TRL, known.name))
    return markdown_table(("`--data-format`", "rows"), [(f"`{known.name}`", known.what) for known in ordered])


TRL = ("messages", "pairs", "prompt-completion", "prompts", "text", "thumbs")


def rows_table() -> str:
    """A row of every format as a Markdown table, and what each stage learns from it."""
    ordered = sorted(NAMES.values(), key=lambda known: (known.name not in TRL, known.name))
    rows = []
    for known in ordered:
        spelled = "<br>".join(_code(json.dumps(raw, ensure_ascii=False)) for raw in EXAMPLES[known.name])
        stages = (" ".join(map(shown, made(known, use))) for use in ("sft", "reward", "rl"))
        rows.append((f"`{known.name}`", spelled, *(_code(text) if text else "" for text in stages)))
    return markdown_table(("format", "row", "sft", "reward", "rl"), rows)


def shown(row: Row) -> str:
    """A row as the documentation shows it, what is learned or compared in ⟦brackets⟧."""
    start = "" if row.prompt is None else _line(row.prompt) + " "
    if isinstance(row, Prompt):
        return start.strip()
    if isinstance(row, Preference):
        return f"{start}⟦{_line(row.chosen)}⟧ > ⟦{_line(row.rejected)}⟧"
    if isinstance(row, Demonstration):
        return f"{start}⟦{_line(row.completion)}⟧" if row.prompt is not None else _learned(row.completion)
    return f"{start}⟦{_line(row.completion)}⟧ {'👍' if row.label else '👎'}"


def _learned(content: Content) -> str:
    if isinstance(content, str):
        return f"⟦{content}⟧"
    turns = ((turn["role"] == "assistant", f"{turn['role']}: {one_line(text_of([turn]))}") for turn in content)
    return " ".join(f"⟦{text}⟧" if is_learned else text for is_learned, text in turns)


def _line(content: Content) -> str:
    if isinstance(content, str):
        return one_line(content)
    return " ".join(f"{turn['role']}: {one_line(text_of([turn]))}" for turn in content)


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
