"""The embedded default world: a barista who turns a customer's sentence into one call, with data and a gold check.

Every row is drawn from a random stream of its own kind, split and seed. Orders belong to "train" or "test" for ever
(`world.split_of`), and the base in `BASE` was pretrained on orders of the train side alone.
"""

import random
from pathlib import Path
from typing import Any

from perlcli.coffee.presets import SETTINGS
from perlcli.coffee.world import call_of, chance, draw_order, gold, mistake, remember, say

__all__ = ["BASE", "NAME", "SETTINGS", "demonstrations", "gold", "preferences", "prompts", "reward", "thumbs"]

BASE: Path = Path(__file__).parent / "base"
NAME = "coffee base (embedded)"
FLIPPED = 0.08
LIKED = 0.4

Row = dict[str, Any]


def demonstrations(split: str = "train", count: int = 2000, seed: int = 0) -> list[Row]:
    """Orders with the call that the trainee barista wrote, who forgets details."""
    rng = _stream("demonstrations", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        prompt = _message("user", say(order, rng))
        completion = _message("assistant", call_of(remember(order, rng, _allowed(split))))
        rows.append({"prompt": prompt, "completion": completion, "order": call_of(order)})
    return rows


def preferences(split: str = "train", count: int = 4000, seed: int = 0) -> list[Row]:
    """Orders with the right call preferred to a wrong one; in train, 8 % of the labels are flipped."""
    rng = _stream("preferences", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        prompt = _message("user", say(order, rng))
        right = _message("assistant", call_of(order))
        wrong = _message("assistant", call_of(mistake(order, rng, _allowed(split))))
        if chance(rng, FLIPPED) and split == "train":
            right, wrong = wrong, right
        rows.append({"prompt": prompt, "chosen": right, "rejected": wrong})
    return rows


def thumbs(split: str = "train", count: int = 4000, seed: int = 0) -> list[Row]:
    """Orders with one call each and whether it was right; about 40 % are."""
    rng = _stream("thumbs", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        prompt = _message("user", say(order, rng))
        right = chance(rng, LIKED)
        answer = order if right else mistake(order, rng, _allowed(split))
        rows.append({"prompt": prompt, "completion": _message("assistant", call_of(answer)), "label": right})
    return rows


def prompts(split: str = "train", count: int = 2000, seed: int = 0) -> list[Row]:
    """Orders alone, each with the canonical call that `gold` compares a completion with."""
    rng = _stream("prompts", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        rows.append({"prompt": _message("user", say(order, rng)), "order": call_of(order)})
    return rows


def reward(completions: list[Any], order: list[str], **columns: Any) -> list[float]:
    """The gold check as a reward function of TRL's signature (`--reward perlcli.coffee:reward`): 1 for a right call."""
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [float(gold(text, wanted)) for text, wanted in zip(texts, order, strict=True)]


def _stream(kind: str, split: str, seed: int) -> random.Random:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    return random.Random(f"coffee {kind} {split} {seed}")


def _allowed(split: str) -> str | None:
    """The side that errors must stay on: in train no answer may spell an order that is judged later."""
    return "train" if split == "train" else None


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
