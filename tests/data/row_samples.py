"""What the tests of data share: turns of conversations, rows as JSON lines, rows converted for a stage."""

import json
from typing import Any

from perlcli.data import Data, Intake, Preference
from perlcli.data.rows import DataReport, SourceRow
from perlcli.settings import DataSettings

Raw = dict[str, Any]
Message = dict[str, str]
PAIR: Raw = {"prompt": "a", "chosen": "b", "rejected": "c"}
THUMB: Raw = {"prompt": "a", "completion": "b", "label": 1}
ROWS: list[Raw] = [PAIR, {"prompt": "Grüße, 世界", "chosen": 'say "x", y', "rejected": "two\nlines"}]
TASK: Raw = {
    "context": json.dumps([{"role": "user", "text": "a latte"}]),
    "generation": json.dumps({"role": "agent", "api": {"add": {"id": "latte"}}}),
    "reward": 1.0,
}
HH: Raw = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: good",
    "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: bad",
}


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def user(content: str) -> list[Message]:
    return [said("user", content)]


def agent(content: str) -> list[Message]:
    return [said("assistant", content)]


def lines(*rows: Any) -> bytes:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def of(*rows: Any) -> Data:
    """Rows as loaded data."""
    return Data(list(rows), list(range(1, len(rows) + 1)), DataReport("x", "pairs", len(rows), len(rows)))


def pairs(*prompts: str) -> Data:
    """A preference for each prompt, as loaded data."""
    return of(*(Preference(prompt, f"b{place}", "c") for place, prompt in enumerate(prompts)))


def converted(*raws: Raw, use: str, chat: bool = True, source: str = "x", **options: Any) -> Data:
    """The rows that source rows become for a use, with the report. Raises PerlError for rows with errors."""
    intake = Intake(source, use, "train", chat=chat, options=DataSettings(**options))
    data = Data([], [], intake.report)
    for number, raw in enumerate(raws, start=1):
        for row in intake.take(number, SourceRow(f"{source}, row {number}", raw)):
            data.rows.append(row)
            data.numbers.append(number)
    intake.check_faults()
    return data


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
