"""Reads conversations that are one text, in the form of Anthropic HH (https://huggingface.co/datasets/Anthropic/hh-rlhf):
`\\n\\nHuman: …` and `\\n\\nAssistant: …`."""

from __future__ import annotations

import re

from perlcli.data.rows import Message

HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}


def is_hh(value: object) -> bool:
    """Whether a value is a conversation as Anthropic HH writes them."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def hh_turns(text: str) -> list[Message]:
    """The turns of a conversation for which `is_hh` holds."""
    parts = HH_TURN.split(text)[1:]
    return [{"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def hh_text(turns: list[Message]) -> str:
    """Turns in the form of Anthropic HH."""
    names = {role: who for who, role in ROLES.items()}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
