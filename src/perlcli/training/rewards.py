"""What `--reward` names, as something that scores what a policy wrote: one reward, or the weighted sum of some."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli.data import Content, Prompt, Renderer, text_of
from perlcli.errors import PerlError, nearest
from perlcli.model import adapters, roles, scorers, sources, tokenizers
from perlcli.model import weights as weights_module
from perlcli.model.sources import Source
from perlcli.redaction import hidden
from perlcli.run import checkpoints
from perlcli.run.record import RunRecord, find_record
from perlcli.text import size
from perlcli.training import reward_model
from perlcli.training.origin import check_adapter, keep_apart
from perlcli.training.prepare import Prepared

MODULE_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PROJECTION = "projection_prng_key"  # of the random matrices that VeRA's and RandLoRA's adapters of a base share
Ids = list[int]
Scorer = Callable[[Sequence[Prompt], Sequence[Ids]], list[float]]


@dataclass(frozen=True)
class Reward:
    """A reward that was found but not loaded: a function, or a model on the policy's base or on another."""

    name: str
    function: Callable[..., Any] | None = None
    source: Source | None = None
    apart: str | None = None  # why a model can't be an adapter on the policy's base

    @property
    def is_shared(self) -> bool:
        """Whether the reward is an adapter on the policy's own base."""
        return self.source is not None and self.apart is None

    @property
    def fingerprint(self) -> str:
        """A digest of the model's weights, or of the function's file; empty where there is none to read."""
        if self.source is not None:
            return weights_module.fingerprint(self.source.adapter or self.source.base)
        file = inspect.getsourcefile(inspect.unwrap(self.function)) if inspect.isfunction(self.function) else None
        return checkpoints.checksum(Path(file))[:16] if file and Path(file).is_file() else ""


@dataclass(frozen=True)
class Scored:
    """Completions with their rewards: the weighted sum, and each reward's own by name."""

    total: list[float]
    parts: dict[str, list[float]]


def find_all(prepared: Prepared) -> list[Reward]:
    """Find what each `--reward` names, before weights are loaded. Raises PerlError."""
    names = prepared.settings.sampling.reward
    if not names:
        raise PerlError(
            "--reward is missing: RL without a reward learns nothing",
            "train one with `perl reward`, then give its folder; or give module:function",
        )
    found = [find(name, prepared) for name in names]
    prepared.run.record.model["rewards"] = {reward.name: reward.fingerprint for reward in found}
    return found


def find(name: str, prepared: Prepared) -> Reward:
    """Find what one `--reward` names. Raises PerlError."""
    if MODULE_FUNCTION.fullmatch(name) and not Path(name).exists():
        return Reward(name, function=_function(name))
    source = sources.locate(name, option="--reward", trust_remote_code=prepared.settings.model.trust_remote_code)
    if not source.is_classifier:
        what = "an adapter without a reward head" if source.adapter else "a language model"
        raise PerlError(f"--reward {name} is {what}, not a reward model", "train one with `perl reward`")
    if source.adapter is None and source.config.num_labels != 1:
        raise PerlError(f"--reward {source.name} gives {source.config.num_labels} labels; a reward is one score")
    keep_apart(prepared.settings, source)
    apart = _apart(source, prepared)
    _check_record(source, prepared, is_shared=apart is None)
    return Reward(name, source=source, apart=apart)


def _function(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script starts without it; `python -m` has it
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's, and raises what it likes
        raise PerlError(f"--reward {name}: can't import {module_name}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise PerlError(f"--reward {name}: {module_name} has no function {attribute}", nearest(attribute, names))
    return function


def _apart(source: Source, prepared: Prepared) -> str | None:
    """Why a reward needs a base of its own; None where it is an adapter of the policy's, which stays frozen."""
    if source.adapter is None or not sources.same_base(source, prepared.source):
        return f"on a base of its own ({source.base_name})"
    if hasattr(prepared.settings, "lora") and prepared.settings.lora.full:
        return f"on a base of its own ({source.base_name}), as --full trains the policy's"
    fault = adapters.why_alone(source.adapter_config)
    if fault is not None:
        return f"on a copy of {source.base_name} ({fault})"
    mine, its = prepared.adapter, source.adapter_config
    kinds = [adapters.kind_of(config) if config is not None else "LORA" for config in (mine, its)]
    if kinds[0] != kinds[1]:
        names = [adapters.name_of(kind) for kind in kinds]
        return f"on a copy of {source.base_name}: it is {names[1]}, and peft takes one kind a base, here {names[0]}"
    if mine is not None and getattr(mine, PROJECTION, None) != getattr(its, PROJECTION, None):
        return f"on a copy of {source.base_name}: its {PROJECTION} is another than the policy's"
    return None


def _check_record(source: Source, prepared: Prepared, *, is_shared: bool) -> None:
    """Hold what the reward tells of its training against this run: the tokens and the base."""
    trained = find_record(source.adapter or source.base)
    check_adapter(source, prepared.run, prepared.settings.model if is_shared else None)
    if trained is not None and trained.status != "finished":
        prepared.run.note(f"The reward {source.name} comes from a run that {trained.status}.")
    if not is_shared:
        return
    marks = (_tokenizer_mark(source, trained, prepared), tokenizers.tokenizer_fingerprint(prepared.tokenizer))
    if marks[0] != marks[1]:
        raise PerlError(
            f"The reward {source.name} was trained with another tokenizer or chat template ({marks[0]}) than "
            f"the policy's ({marks[1]}): it would score other text than it knows"
        )


def _tokenizer_mark(source: Source, trained: RunRecord | None, prepared: Prepared) -> Any:
    """The fingerprint of the tokenizer that a reward was trained with: by its record, else by the one in its folder."""
    if trained is not None:
        return trained.model.get("tokenizer")
    if not tokenizers.has_tokenizer(source):
        return tokenizers.tokenizer_fingerprint(prepared.tokenizer)  # it doesn't tell: the base's, as the policy's is
    trust = prepared.settings.model.trust_remote_code
    return tokenizers.tokenizer_fingerprint(tokenizers.load_tokenizer(source, trust_remote_code=trust))


class TokenReward:
    """Scores the very tokens that the policy wrote, rendered as the reward model's training rows were."""

    def __init__(self, scorer: Callable[[Sequence[Ids]], list[float]], render: Renderer, batch: int) -> None:
        self.scorer, self.render, self.batch = scorer, render, batch

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> list[float]:
        """One reward a completion."""
        ids = [self.render.scored_ids(row.prompt, completion) for row, completion in zip(rows, written, strict=True)]
        return scorers.scores_in_batches(self.scorer, ids, self.batch)


class TextReward:
    """Scores decoded completions with a reward model of another tokenizer, by that model's own template."""

    def __init__(self, scorer: Any, tokenizer: Any, render: Renderer, batch: int, eos_ids: Sequence[int] = ()) -> None:
        self.scorer, self.tokenizer, self.render, self.batch = scorer, tokenizer, render, batch
        self.own = Renderer(tokenizer, eos_ids) if tokenizer.eos_token_id is not None else None

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> list[float]:
        """One reward a completion; a truncated one is scored without an end."""
        ids = [self._ids(row.prompt, completion) for row, completion in zip(rows, written, strict=True)]
        return scorers.scores_in_batches(self.scorer, ids, self.batch)

    def _ids(self, prompt: Content, written: Ids) -> Ids:
        text = self.render.text(written)
        if self.own is None or (not isinstance(prompt, str) and not self.own.chat):
            return list(self.tokenizer(f"{text_of(prompt)}\n{text}", truncation=True)["input_ids"])
        answer: Content = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        ids = self.own.completion_ids(prompt, answer)
        if not self.render.ended(written):
            end = next(index for index, token in enumerate(ids) if token in self.own.eos_ids)
            ids = ids[:end]
        return self.own.prompt_ids(prompt) + ids


class FunctionReward:
    """Calls a reward function as TRL does: prompts, completions, completion_ids and the other columns by name."""

    def __init__(self, function: Callable[..., Any], name: str, render: Renderer) -> None:
        self.function, self.name, self.render = function, name, render

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> list[float]:
        """One reward a completion; raises PerlError where the function gives something else."""
        texts = [self.render.text(ids) for ids in written]
        completions = [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        columns = {key: [row.extra.get(key) for row in rows] for key in rows[0].extra}
        try:
            found = self.function(
                prompts=[row.prompt for row in rows], completions=completions, completion_ids=list(written), **columns
            )
            rewards = [float(value) for value in found]
        except Exception as error:  # the function is the user's, and raises what it likes
            raise PerlError(f"The reward function {self.name} failed: {type(error).__name__}: {error}") from error
        if len(rewards) != len(rows):
            raise PerlError(f"The reward function {self.name} gave {len(rewards)} rewards for {len(rows)} completions")
        return rewards


class Weighted:
    """The weighted sum of some rewards of the same completions, less a penalty for one that did not end by itself."""

    def __init__(
        self, rewards: Mapping[str, Scorer], weights: Sequence[float], penalty: float = 0.0,
        ended: Callable[[Ids], bool] = bool,
    ) -> None:  # fmt: skip
        self.rewards, self.weights, self.penalty, self.ended = rewards, weights, penalty, ended

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> Scored:
        """Every completion's sum and its parts."""
        parts = {name: reward(rows, written) for name, reward in self.rewards.items()}
        rows_of = zip(*parts.values(), strict=True)
        sums = [sum(w * r for w, r in zip(self.weights, row, strict=True)) for row in rows_of]
        taken = [r - self.penalty * (not self.ended(ids)) for r, ids in zip(sums, written, strict=True)]
        return Scored(taken, parts)

    def bytes(self) -> dict[str, int]:
        """What each reward adds to memory."""
        found = {name: getattr(reward, "scorer", None) for name, reward in self.rewards.items()}
        return {name: scorer.bytes if scorer is not None else 0 for name, scorer in found.items()}


def attach_all(found: Sequence[Reward], model: Any, prepared: Prepared, batch: int) -> Weighted:
    """Load the rewards: as adapters on the policy's own base where they share it, else as models beside it. Says so."""
    names = _short_names([reward.name for reward in found])
    weights = prepared.settings.sampling.reward_weights or (1.0,) * len(found)
    rewards: dict[str, Scorer] = {}
    for index, (name, weight, reward) in enumerate(zip(names, weights, found, strict=True)):
        adapter = roles.REWARD if index == 0 else f"{roles.REWARD}{index + 1}"
        rewards[name] = attach(reward, model, prepared, batch, adapter)
        if len(found) > 1:
            prepared.run.note(f"  weight {weight:g}, told as rewards/{name}")
    penalty = prepared.settings.rl.missing_eos_penalty if hasattr(prepared.settings, "rl") else None
    return Weighted(rewards, weights, penalty or 0.0, prepared.renderer.ended)


def _short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name where that tells them apart, else the whole."""
    names = [hidden(name) for name in names]  # they name metrics, which TRL writes into checkpoints
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def attach(reward: Reward, model: Any, prepared: Prepared, batch: int, adapter: str = roles.REWARD) -> Scorer:
    """Load one reward; `adapter` is its name on the policy's base, where it shares that."""
    render, note = prepared.renderer, prepared.run.note
    if reward.function is not None:
        note(f"reward: the function {reward.name}")
        return FunctionReward(reward.function, reward.name, render)
    assert reward.source is not None
    if not reward.is_shared:
        return _beside(reward, prepared, batch)
    head = scorers.attach_reward(model, str(reward.source.adapter), adapter)
    unread = tokenizers.score_pad(reward.source, trust_remote_code=prepared.settings.model.trust_remote_code)
    scorer = scorers.SharedScorer(model, head, prepared.tokenizer.pad_token_id, unread, adapter)
    note(f"reward: {reward.name}, an adapter on the policy's own base (adds {size(scorer.bytes)})")
    reward_model.check_proof(reward.source, scorer, prepared.run, prepared.settings.model)
    return TokenReward(scorer, render, batch)


def _beside(reward: Reward, prepared: Prepared, batch: int) -> TokenReward | TextReward:
    """A reward model with weights of its own."""
    source, render = reward.source, prepared.renderer
    assert source is not None
    prepared.run.note(f"reward: {source.name}, {reward.apart}, loaded beside the policy's")
    values = prepared.settings.model
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=values.trust_remote_code)
    own = reward_model.precision_of(source, values)
    scorer = reward_model.load(source, own)
    reward_model.check_proof(source, scorer, prepared.run, own)
    if tokenizers.tokenizer_fingerprint(tokenizer) == tokenizers.tokenizer_fingerprint(prepared.tokenizer):
        return TokenReward(scorer, render, batch)
    return TextReward(scorer, tokenizer, render, batch, tokenizers.eos_ids(source))
