"""How a run was set up, in words for reports and model cards: data, rendering, batch, lengths, what it used."""

from __future__ import annotations

from typing import Any

from perlcli.run import lineage
from perlcli.run.record import RunRecord
from perlcli.text import counted

ROLES = {"train": "training data", "eval": "held-out data"}


def described(record: RunRecord) -> dict[str, str]:
    """The settings that a reader needs to judge a run's figures, by name; only those that the run has."""
    values = record.settings
    known = {
        **_of_models(record),
        **{ROLES[role]: rows(record.data[role]) for role in ROLES if role in record.data},
        "rendering": _rendering(record),
        "batch": _batch(values),
        "longest row": _tokens(values.get("max_length")),
        "completions": _completions(values),
        "optimiser": str(values.get("optim") or ""),
        "device": device(record.device),
    }
    return {name: text for name, text in known.items() if text}


def _of_models(record: RunRecord) -> dict[str, str]:
    """What a policy started from, what it is compared with, and what judges it."""
    if record.command not in ("rl", "eval"):
        return {}
    is_rl, started = record.command == "rl", str(record.model.get("name") or "")
    judges = ", ".join(map(str, record.settings.get("reward") or ()))
    beta = record.settings.get("beta")
    return {
        "starts from" if is_rl else "evaluated": started,
        "anchor" if is_rl else "opponent": lineage.opponent(record),
        "reward": judges,
        "algorithm": str(record.settings.get("algorithm") or ""),
        "KL penalty": f"{beta:g}" if isinstance(beta, int | float) else "",
    }


def rows(data: dict[str, Any]) -> str:
    """A source of rows with how many were kept: `pairs.jsonl, 2,000 rows (pairs)`."""
    kept, form = data.get("kept"), data.get("format")
    parts = [str(data.get("source") or ""), counted(kept, "row") if isinstance(kept, int) else ""]
    text = ", ".join(filter(None, parts))
    return f"{text} ({form})" if text and form else text


def _rendering(record: RunRecord) -> str:
    """How rows became tokens, and which tokens are learned."""
    ways = [way for role in ROLES for way in record.data.get(role, {}).get("rendered", ())]
    loss_on = record.settings.get("loss_on")
    learned = {
        "assistant": "loss on the assistant's turns",
        "last": "loss on the last turn",
        "all": "loss on all tokens",
    }
    return "; ".join(filter(None, (*dict.fromkeys(map(str, ways)), learned.get(str(loss_on), ""))))


def _batch(values: dict[str, Any]) -> str:
    """The rows of a step: `32`, or `8 x 4 passes = 32`."""
    rows_per_pass, passes = values.get("per_device_train_batch_size"), values.get("gradient_accumulation_steps") or 1
    if not rows_per_pass:
        size = values.get("per_device_eval_batch_size")
        return str(size) if size else ""
    return str(rows_per_pass) if passes == 1 else f"{rows_per_pass} x {passes} passes = {rows_per_pass * passes}"


def _tokens(limit: object) -> str:
    return counted(limit, "token") if isinstance(limit, int) else ""


def _completions(values: dict[str, Any]) -> str:
    """How completions are sampled."""
    limit, temperature, count = (
        values.get(name) for name in ("max_completion_length", "temperature", "num_generations")
    )
    if not limit:
        return ""
    parts = [f"at most {_tokens(limit)}", f"temperature {temperature:g}" if temperature else ""]
    return ", ".join(filter(None, [*parts, f"{count} per prompt" if count else ""]))


def device(found: dict[str, Any]) -> str:
    """The device by name, on a CPU with its threads."""
    threads = found.get("threads") if found.get("type") != "cuda" else None
    named = [str(found.get("name") or ""), counted(threads, "thread") if isinstance(threads, int) else ""]
    return ", ".join(filter(None, named))
