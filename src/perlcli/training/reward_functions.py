"""Reward functions: found by name, and called as TRL calls them.

The contract is that of `trl.RLOOTrainer._calculate_rewards`: prompts, completions, completion_ids and the data's other
columns by name, trainer_state, log_extra and log_metric; one number per completion, or None where the function has no
opinion; plain or async."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Container, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat, TypeVar

from transformers import TrainerState

from perlcli.data import Prompt, Renderer
from perlcli.errors import PerlError, listing, nearest
from perlcli.run.metrics import METRICS
from perlcli.settings.yaml import parse
from perlcli.text import counted, shorten
from perlcli.training import user_code
from perlcli.training.reward_errors import KWARGS, Opinions, RewardRaised
from perlcli.training.reward_names import check_file

CONTRACT = "a reward function has a parameter `completions`, and returns a number for each"
JUDGED = ("prompts", "completions", "completion_ids")  # a function that takes none of them makes one
LONGEST_NAME = 200  # characters of what a function logs
# Metrics of the step that a function's own of the same name would be averaged with, or replace.
OF_TRAINER = {"loss", "grad_norm", "learning_rate", "epoch", *(metric.key for metric in METRICS["rl"])}
Ids = list[int]
Function = Callable[..., Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Calling:
    """What a reward function may know, and how it logs. Outside of training the state is new, and logs are lost."""

    trainer_state: TrainerState = field(default_factory=TrainerState)
    log_extra: Callable[[str, list[Any]], None] = lambda column, values: None
    log_metric: Callable[[str, float], None] = lambda name, value: None


def find(name: str, given: Mapping[str, Any]) -> Function:
    """The function that `--reward` names, with the keyword arguments of `--reward-kwargs`. What makes a function (it
    takes no completions) is called with them. Raises PerlError if there is none, or it can't be called like that."""
    place, _, attribute = name.rpartition(":")
    module = _from_file(place, name) if place.endswith(".py") else _from_module(place, name)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        meant = nearest(attribute, names)
        if found is None:
            raise PerlError(f"--reward {name}: {place} has no function {attribute}", meant)
        problem = f"--reward {name} is not a function: {place} has {attribute} = {user_code.shown(found)}"
        raise PerlError(problem, meant or CONTRACT)
    if not makes_function(found):
        _check_taken(name, found, given)
        return functools.partial(found, **given) if given else found
    _check_taken(name, found, given, all_of=True)
    with user_code.as_fault(lambda error: PerlError(f"--reward {name} failed: {user_code.words(error)}")):
        made = found(**given)
    if not callable(made):
        problem = f"--reward {name} is not a reward function: it takes no completions, and gave {user_code.shown(made)}"
        raise PerlError(problem, CONTRACT)
    return made


def makes_function(found: Function) -> bool:
    """Whether it is a class, or takes nothing that a reward function gets: then it gives a function when called."""
    parameters = _parameters(found)
    if isinstance(found, type) or parameters is None:
        return isinstance(found, type)
    kinds = {parameter.kind for parameter in parameters.values()}
    return not kinds & {inspect.Parameter.VAR_KEYWORD} and not set(JUDGED) & parameters.keys()


def _parameters(found: Function) -> Mapping[str, inspect.Parameter] | None:
    """The parameters by name; None for what doesn't tell, such as some functions in C."""
    try:
        return inspect.signature(found).parameters
    except (ValueError, TypeError):
        return None


def _check_taken(name: str, found: Function, given: Mapping[str, Any], *, all_of: bool = False) -> None:
    """Raises PerlError unless the function takes these keyword arguments; with `all_of`, if it needs more."""
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(**given) if all_of else signature.bind_partial(**given)
    except TypeError as error:
        wanted = f"{name.rpartition(':')[2]}{signature.replace(return_annotation=inspect.Signature.empty)}"
        if all_of:
            needed = [key for key, each in signature.parameters.items() if each.default is each.empty]
            example = json.dumps(dict.fromkeys(needed or signature.parameters, 1))
            problem = f"--reward {name} makes a reward function: {error}"
            raise PerlError(problem, f"it is {wanted}; give it what it needs: {KWARGS} '{example}'") from error
        raise PerlError(f"{KWARGS}: --reward {name}: {error}", f"it is {wanted}") from error


def _from_module(place: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script starts without it, `python -m` with it
    return _imported(lambda: importlib.import_module(place), place, name)


def _from_file(place: str, name: str) -> ModuleType:
    """A module from a file, with the file's folder for what it imports itself."""
    check_file(name)
    path = Path(place).expanduser().resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up

    def execute() -> ModuleType:
        loader.exec_module(module)
        return module

    return _imported(execute, place, name)


def _imported(load: Callable[[], ModuleType], place: str, name: str) -> ModuleType:
    def fault(error: BaseException) -> PerlError:
        return PerlError(f"--reward {name}: can't import {place}: {user_code.words(error)}")

    def changed(what: str) -> PerlError:
        return PerlError(f"--reward {name}: importing {place} {what}")

    with user_code.unchanged(changed), user_code.as_fault(fault):
        return load()


def keyword_arguments(given: Sequence[str], names: Sequence[str], takes: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The keyword arguments of each reward in `names`, from the values of --reward-kwargs: one for each --reward, or a
    single one for the only reward that takes any. Raises PerlError for anything else."""
    faults, parsed = [], []
    for text in given:
        value = parse(text, KWARGS)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            faults.append(f"{KWARGS} must be a JSON object, not {shorten(text)}")
        parsed.append(dict(value) if isinstance(value, dict) else {})
    if faults:
        raise PerlError(listing(faults), f"{KWARGS} '{{\"limit\": 100}}'")
    takers = [index for index, name in enumerate(names) if takes(name)]
    if len(parsed) == 1 and len(names) > 1 and len(takers) == 1:
        parsed = [parsed[0] if index in takers else {} for index in range(len(names))]
    if parsed and len(parsed) != len(names):
        problem = f"{KWARGS} must be given once for each --reward: {len(names)} times, not {len(parsed)}"
        raise PerlError(problem, f"{KWARGS} '{{}}' for a reward that needs none")
    for name, own in zip(names, parsed, strict=False):
        if own and not takes(name):
            raise PerlError(f"{KWARGS} {shorten(own)}: --reward {name} is a model, which takes no arguments")
    return parsed or [{} for _ in names]


class FunctionReward:
    """Calls a reward function. It gets copies: what it changes is seen by no other reward, and by no later call."""

    def __init__(self, function: Function, name: str, render: Renderer) -> None:
        self.function, self.name, self.render = function, name, render
        self.fixed = getattr(function, "keywords", {})  # come before columns of the same name
        parameters = _parameters(function)
        takes_all = parameters is None or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self.parameters = None if takes_all else parameters

    @property
    def is_async(self) -> bool:
        """Whether calling it gives something to wait for."""
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids], calling: Calling | None = None) -> Opinions:
        """One reward or None per completion; raises PerlError if the function fails or returns anything else."""
        calling = calling or Calling()
        if self.is_async:
            return wait_for(self.judge(rows, written, calling))
        arguments = self._arguments(rows, written, calling)
        with user_code.unchanged(self._failed), user_code.as_fault(self._raised):
            values = self.function(**arguments)  # not inside of an event loop: the function may run one
        return self._numbers(values, len(rows))

    async def judge(self, rows: Sequence[Prompt], written: Sequence[Ids], calling: Calling) -> Opinions:
        """The same for an async function, to be waited for."""
        arguments = self._arguments(rows, written, calling)
        with user_code.as_fault(self._raised):
            values = await self.function(**arguments)
        return self._numbers(values, len(rows))

    def _arguments(self, rows: Sequence[Prompt], written: Sequence[Ids], calling: Calling) -> dict[str, Any]:
        """What the function is called with: all of it, or what its parameters name."""
        texts = [self.render.text(ids) for ids in written]
        completions = [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        names = dict.fromkeys(name for row in rows for name in row.extra)
        columns = {name: [row.extra.get(name) for row in rows] for name in names if name not in self.fixed}
        ours = {"prompts": [row.prompt for row in rows], "completions": completions, "completion_ids": list(written)}
        copied = copy.deepcopy(columns | ours)
        arguments = copied | {"trainer_state": calling.trainer_state} | self._logs(calling, len(rows))
        if self.parameters is None:
            return arguments
        missing = [
            name
            for name, each in self.parameters.items()
            if each.default is each.empty and each.kind is not each.VAR_POSITIONAL and name not in arguments
        ]
        if missing:
            has = f"the data has {', '.join(columns)}" if columns else "the data has no column besides the prompt"
            raise self._failed(f"needs the column {missing[0]}: {has}")
        return {name: value for name, value in arguments.items() if name in self.parameters}

    def _logs(self, calling: Calling, count: int) -> dict[str, Callable[[str, Any], None]]:
        """What the function logs with, checked: trl would fail on it later, in words that don't name the function."""

        def log_metric(name: str, value: SupportsFloat) -> None:
            self._check_name("log_metric", name, OF_TRAINER)
            with user_code.as_fault(lambda error: self._failed(f"logs {name}={user_code.shown(value)}, not a number")):
                number = float(value)
            calling.log_metric(name, number)

        def log_extra(column: str, values: object) -> None:
            self._check_name("log_extra", column)
            if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection) or len(values) != count:
                wanted = f"a list of {counted(count, 'value')}, one per completion"
                raise self._failed(f"logs {column}={user_code.shown(values)}, not {wanted}")
            with user_code.as_fault(self._raised):
                calling.log_extra(column, list(values))

        return {"log_metric": log_metric, "log_extra": log_extra}

    def _check_name(self, function: str, name: object, taken: Container[str] = ()) -> None:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
            raise self._failed(f"calls {function} with the name {user_code.shown(name)}, not a short text")
        if name in taken:
            raise self._failed(f"calls {function} with the name {name}, which training logs itself: use another")

    def _numbers(self, values: object, count: int) -> Opinions:
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise self._failed(f"returned {user_code.shown(values)}, not a list with a number for each completion")
        with user_code.as_fault(self._raised):  # a generator is the user's code too, and may be endless
            items = list(islice(values, count + 1))
        with user_code.as_fault(self._no_number):
            rewards = [None if value is None else float(value) for value in items]
        if len(rewards) != count:
            returned = f"more than {count}" if len(rewards) > count else f"{len(rewards)}"
            raise self._failed(f"returned {returned} rewards for {count} completions")
        return rewards

    def _raised(self, error: BaseException) -> RewardRaised:
        return RewardRaised(f"The reward function {self.name} failed: {user_code.words(error)}")

    def _no_number(self, error: BaseException) -> PerlError:
        return self._failed(f"returned something that is not a number: {user_code.words(error)}")

    def _failed(self, what: str) -> PerlError:
        return PerlError(f"The reward function {self.name} {what}")


def wait_for(awaited: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine. One event loop serves all calls: clients that a function keeps belong to it. Raises
    PerlError if it cancels itself."""
    try:
        return _runner().run(awaited)
    except asyncio.CancelledError as error:  # an interrupt arrives as KeyboardInterrupt
        raise PerlError("A reward function cancelled its own task: it raised asyncio.CancelledError") from error


@functools.cache
def _runner() -> asyncio.Runner:
    return asyncio.Runner()
