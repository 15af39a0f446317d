"""The commands that make sense after a command, with the real folders and data of its run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli import settings as definitions
from perlcli.run import lineage
from perlcli.run.record import RunRecord
from perlcli.settings import Use

MOST = 3  # commands after a run
COFFEE, STDIN = "coffee", "-"
# Stand for data that the user has to bring: nothing in the run says which.
PROMPTS, PREFERENCES = "PROMPTS.jsonl", "PREFERENCES.jsonl"
# What describes the source of --data, and how the base is loaded: the next command needs the same.
OF_DATA = ("data_format", "columns", "label_map", "label_threshold", "score_field", "subset")
OF_MODEL = ("dtype", "load_in_4bit", "load_in_8bit", "trust_remote_code")
OF_REWARD = ("reward", "reward_kwargs", "reward_weights", "on_reward_error")
OF_LENGTH = ("max_length", "max_completion_length", "temperature")
UNCHANGED = {"dtype": "auto", "on_reward_error": "stop"}
QUICKSTART = """\
Next:
  perl eval --model {out}/rl --reward {out}/reward --output runs/eval      samples of policy and anchor
  perl rl --model {out}/sft --reward {out}/reward --beta 0.2 --output runs/rl     a stronger pull to the anchor
  perl reward --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl      your own model and data"""
Words = list[str]


def text(record: RunRecord) -> str:
    """`Next:` and a line for each command; empty for a run that leads nowhere."""
    return shown(list(_after(record))[:MOST])


def shown(commands: Sequence[Words]) -> str:
    """Commands below `Next:`, quoted for the shell; empty without any."""
    return "\n".join(["Next:", *(f"  {shlex.join(words)}" for words in commands)]) if commands else ""


def after_quickstart(out: Path) -> str:
    """What to try after `perl quickstart`."""
    return QUICKSTART.format(out=shlex.quote(str(out)))


def after_convert(path: Path, use: Use) -> str:
    """What to do with a converted file."""
    own: list[Words] = [["perl", "data", "check", str(path)], ["perl", "data", "show", str(path), "--for", use]]
    if use != "rl":  # which needs a reward too
        own.append(["perl", use, "--data", str(path), "--output", _free(Path("runs") / use)])
    return shown(own)


def _after(record: RunRecord) -> Iterator[Words]:
    """The commands after a run, the most useful first."""
    folder = str(record.settings["output"])
    if record.command in ("sft", "reward", "rl"):
        yield from _after_training(record, folder)
        yield ["perl", "report", folder]
    elif record.command == "eval":
        yield from _after_eval(record, folder)
    elif record.command == "merge":
        before = lineage.record_of(record.settings.get("adapter"))
        if before is not None and (evaluation := _evaluation(before, folder)):
            yield evaluation
        if before is not None and before.command == "reward":
            yield _rl(before, folder)
    elif record.command == "compare-full":
        yield ["perl", "report", folder]
        yield ["perl", "runs", folder]


def _after_training(record: RunRecord, folder: str) -> Iterator[Words]:
    if evaluation := _evaluation(record, folder):
        yield evaluation
    if record.command == "reward":
        yield _rl(record, folder)
    if record.command == "sft":
        judge = _sibling(record, "reward")
        yield _reward(record) if judge is None else _rl(record, judge, folder)
    if record.command != "reward" and not record.settings.get("full"):
        yield ["perl", "merge", folder, *_output(Path(folder).with_name(f"{Path(folder).name}-merged"))]


def _after_eval(record: RunRecord, folder: str) -> Iterator[Words]:
    model = record.settings.get("model")
    before = lineage.record_of(model)
    is_shown = before is not None and before.command in ("sft", "reward", "rl")
    yield ["perl", "report", *([str(model)] if is_shown else []), folder]
    if before is not None and is_shown:
        skipped = ("eval", "report")
        yield from (words for words in _after_training(before, str(model)) if words[1] not in skipped)


def _evaluation(record: RunRecord, folder: str) -> Words:
    """`perl eval` of a model on the held-out rows of a training run; empty if the run has none, or no longer."""
    values, train = record.settings, record.data.get("train", {})
    source, others = values.get("eval_data") or values.get("data"), []
    if "eval" not in record.data or source == STDIN or record.command not in ("sft", "reward", "rl"):
        return []
    if train.get("held_out") and not values.get("eval_data"):
        # rows that were too long to train on are still in the data
        others = ["--skip-trained", *_split(values), "--on-long", values.get("on_long") or "drop"]
    names = [*OF_MODEL, *(OF_DATA if source == values.get("data") else OF_DATA[:-1])]
    names += [*OF_REWARD, *OF_LENGTH] if record.command == "rl" else []
    words = ["perl", "eval", "--model", folder, *_options(record, names), *_data(record, source)]
    if record.command != "rl" and _is_long(record):
        words += ["--max-length", str(values["max_length"])]
    default = Path(folder).expanduser()
    return [*words, *others, *_output(default.with_name(f"eval-{default.name}"), is_default=True)]


def _is_long(record: RunRecord) -> bool:
    """Whether an evaluation needs another length than its default. A policy's completions would lack room in less."""
    longest, default = record.settings.get("max_length") or 0, definitions.GENERAL["max_length"]
    return bool(longest > default or (record.command == "reward" and longest != default and not _is_toy(record)))


def _split(values: dict[str, Any]) -> Words:
    """The split that rows were held out of: an evaluation would read the test split, which isn't there."""
    is_file = Path(str(values["data"])).expanduser().is_file()
    return [] if is_file else ["--split", values.get("split") or "train"]


def _reward(record: RunRecord) -> Words:
    """`perl reward` on the base of a policy, on the same data if it has pairs or thumbs."""
    words = ["perl", "reward", *_base(record), *_options(record, OF_MODEL)]
    if "reward" in _served(record):
        words += [*_options(record, OF_DATA), *_data(record, record.settings.get("data"))]
    elif not _is_toy(record):
        words += ["--data", PREFERENCES]
    return [*words, "--output", _free(_next_to(record, "reward"))]


def _rl(record: RunRecord, judge: str, policy: str | None = None) -> Words:
    """`perl rl` of a policy against a reward, on the run's data if that has prompts."""
    start = policy or _sibling(record, "sft")
    words = ["perl", "rl", *(_base(record) if start is None else ["--model", start]), "--reward", judge]
    words += _options(record, OF_MODEL)
    if "rl" in _served(record):
        words += [*_options(record, OF_DATA), *_data(record, record.settings.get("data"))]
    elif not _is_toy(record):
        words += ["--data", PROMPTS]
    return [*words, "--output", _free(_next_to(record, "rl"))]


def _served(record: RunRecord) -> list[str]:
    """The stages that the training rows can be used for."""
    own = record.data.get("train", {}).get("serves", [])
    return [] if record.settings.get("data") == STDIN else list(own)


def _is_toy(record: RunRecord) -> bool:
    """Whether a run is on the embedded base and data, which are the defaults."""
    return record.model.get("base") == coffee.NAME and record.settings.get("data") in (None, COFFEE)


def _base(record: RunRecord) -> Words:
    base = str(record.model.get("base", ""))
    return [] if base == coffee.NAME else ["--model", base]


def _data(record: RunRecord, source: str | None) -> Words:
    return [] if source is None or _is_toy(record) else ["--data", source]


def _options(record: RunRecord, names: Sequence[str]) -> Words:
    """The options with these names that differ from their defaults, as they are typed."""
    words: Words = []
    defaults = definitions.GENERAL | UNCHANGED
    for name in names:
        value, option = record.settings.get(name), f"--{definitions.dashed(name)}"
        if value in (None, False, (), []) or value == defaults.get(name) or (name in OF_LENGTH and _is_toy(record)):
            continue
        if value is True:
            words.append(option)
        elif name == "reward_weights":
            words += [option, ",".join(map(str, value))]
        elif isinstance(value, list | tuple):
            words += [word for each in value for word in (option, str(each))]
        else:
            words += [option, str(value)]
    return words


def _sibling(record: RunRecord, command: str) -> str | None:
    """The folder next to a run's with the default name of another stage, if it is a finished run on the same base."""
    folder = _next_to(record, command)
    found = lineage.record_of(str(folder))
    is_same = found is not None and found.model.get("base") == record.model.get("base")
    return (
        str(folder)
        if found is not None and is_same and (found.command, found.status) == (command, "finished")
        else None
    )


def _next_to(record: RunRecord, name: str) -> Path:
    return Path(str(record.settings["output"])).with_name(name)


def _output(wanted: Path, *, is_default: bool = True) -> Words:
    """`--output` with a free folder; nothing if the command's own default is free."""
    free = _free(wanted)
    return [] if is_default and free == str(wanted) else ["--output", free]


def _free(wanted: Path) -> str:
    """A folder that does not exist yet: this one, or else with a number."""
    path, number = wanted, 1
    while path.expanduser().exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return str(path)
