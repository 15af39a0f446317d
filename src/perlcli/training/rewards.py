"""What `--reward` names, as something that scores a policy's completions: one reward or a weighted sum of several."""

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

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perlcli import settings
from perlcli.data import Prompt, Renderer, text_of
from perlcli.data.chat import Style
from perlcli.errors import PerlError, nearest
from perlcli.model import adapters, heads, roles, scorers, sources, tokenizers, weights
from perlcli.model.sources import Source
from perlcli.redaction import hidden
from perlcli.run import checkpoints
from perlcli.text import size
from perlcli.training import rendering, reward_model
from perlcli.training.origin import check_adapter, keep_apart
from perlcli.training.prepare import Prepared

MODULE_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PROJECTION = "projection_prng_key"  # seeds the random matrices that all VeRA or RandLoRA adapters of a base share
Ids = list[int]
Scorer = Callable[[Sequence[Prompt], Sequence[Ids]], list[float]]  # one reward per completion
Stage = settings.Rl | settings.Eval


@dataclass(frozen=True)
class Reward:
    """A reward that was found but not loaded: a function, or a model on the policy's base or a separate one."""

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
        """A digest of the model's weights, or of the function's file; empty if there is neither."""
        if self.source is not None:
            return weights.fingerprint(self.source.place)
        file = inspect.getsourcefile(inspect.unwrap(self.function)) if inspect.isfunction(self.function) else None
        return checkpoints.checksum(Path(file))[:16] if file and Path(file).is_file() else ""


@dataclass(frozen=True)
class Scored:
    """The rewards of some completions: the weighted sum, and each reward on its own by name."""

    total: list[float]
    parts: dict[str, list[float]]


def find_all(prepared: Prepared[Stage]) -> list[Reward]:
    """What each `--reward` names, before weights are loaded. Raises PerlError if there is none, or one is unusable."""
    names = prepared.settings.sampling.reward
    if not names:
        hint = "train one with `perl reward` and name its folder, or name a function as module:function"
        raise PerlError("--reward is missing: RL learns nothing without a reward", hint)
    rewards = [find(name, prepared) for name in names]
    prepared.run.record.model["rewards"] = {reward.name: reward.fingerprint for reward in rewards}
    return rewards


def find(name: str, prepared: Prepared[Stage]) -> Reward:
    """What one `--reward` names. Raises PerlError if it can't be a reward."""
    if MODULE_FUNCTION.fullmatch(name) and not Path(name).exists():
        return Reward(name, function=_function(name))
    source = sources.locate(name, option="--reward", trust_remote_code=prepared.settings.model.trust_remote_code)
    if not source.is_classifier:
        what = "an adapter without a reward head" if source.adapter else "a language model"
        raise PerlError(f"--reward {name} is {what}, not a reward model", "train one with `perl reward`")
    if source.adapter is None and source.config.num_labels != 1:
        raise PerlError(f"--reward {source.name} has {source.config.num_labels} labels, but a reward is a single score")
    heads.is_on_causal(source, full=True, trust_remote_code=prepared.settings.model.trust_remote_code)
    keep_apart(prepared.settings, source)
    apart = _apart(source, prepared)
    _check_record(source, prepared, is_shared=apart is None)
    return Reward(name, source=source, apart=apart)


def _function(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script starts without it, `python -m` with it
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module can raise anything
        raise PerlError(f"--reward {name}: can't import {module_name}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise PerlError(f"--reward {name}: {module_name} has no function {attribute}", nearest(attribute, names))
    return function


def _apart(source: Source, prepared: Prepared[Stage]) -> str | None:
    """Why a reward needs a separate base, and which; None if it can be an adapter on the policy's base."""
    its, policy, name = source.adapter_config, prepared.adapter, source.base_name
    if its is None or not sources.same_base(source, prepared.source):
        return f"on its own base ({name})"
    if isinstance(prepared.settings, settings.Rl) and prepared.settings.lora.full:
        return f"on its own base ({name}), because --full trains the policy's"
    fault = adapters.why_alone(its) or adapters.apart(policy, its) or heads.why_alone(source)
    if fault is not None:
        return f"on a copy of {name} ({fault})"
    kind, policy_kind = sources.kind_of(its), sources.kind_of(policy) if policy is not None else "LORA"
    if kind != policy_kind:
        kinds = f"it is {adapters.name_of(kind)}, the policy's adapter is {adapters.name_of(policy_kind)}"
        return f"on a copy of {name}: {kinds}, and peft allows one type per base"
    if policy is not None and getattr(policy, PROJECTION, None) != getattr(its, PROJECTION, None):
        return f"on a copy of {name}: its {PROJECTION} differs from the policy's"
    return None


def _check_record(source: Source, prepared: Prepared[Stage], *, is_shared: bool) -> None:
    """Raises PerlError if this run has another base or tokenizer than the reward's training had."""
    check_adapter(source, prepared.run, prepared.settings.model if is_shared else None)
    if source.record is not None and source.record.status != "finished":
        prepared.run.note(f"The reward {source.name} comes from a run that did not finish ({source.record.status}).")
    rendering.check(source, prepared.run, "The reward")
    rendering.decide_later(source, prepared.settings.data, prepared.renderer)
    if not is_shared:
        return
    its, ours = _tokenizer_mark(source, prepared), tokenizers.tokenizer_fingerprint(prepared.tokenizer)
    if its != ours:
        problem = (
            f"The reward {source.name} was trained with another tokenizer or chat template ({its}) than the policy's"
        )
        raise PerlError(f"{problem} ({ours}): it would score text that it was not trained on")


def _tokenizer_mark(source: Source, prepared: Prepared[Stage]) -> object:
    """The fingerprint of the tokenizer that a reward was trained with, by its record or the tokenizer in its folder."""
    if source.record is not None:
        return source.record.model.get("tokenizer")
    if not tokenizers.has_tokenizer(source):  # unknown: presumably the base's, as the policy's is
        return tokenizers.tokenizer_fingerprint(prepared.tokenizer)
    trust = prepared.settings.model.trust_remote_code
    return tokenizers.tokenizer_fingerprint(tokenizers.load_tokenizer(source, trust_remote_code=trust))


class TokenReward:
    """Scores exactly the tokens that the policy wrote, rendered as the reward model's training rows were."""

    def __init__(self, scorer: scorers.Scorer, render: Renderer, batch: int) -> None:
        self.scorer, self.render, self.batch = scorer, render, batch

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> list[float]:
        """One reward per completion."""
        ids = [self.render.scored_ids(row.prompt, ids, row.template) for row, ids in zip(rows, written, strict=True)]
        return self.scorer(ids, self.batch)


class TextReward:
    """Scores decoded completions with a reward model that has another tokenizer, by that model's chat template, `batch`
    rows at a time. `own` is the reward model's renderer if it has an EOS, `render` the policy's."""

    def __init__(
        self,
        scorer: scorers.Scorer,
        tokenizer: PreTrainedTokenizerBase,
        render: Renderer,
        batch: int,
        eos_ids: Sequence[int] = (),
        style: Style | None = None,
    ) -> None:
        self.scorer, self.tokenizer, self.render, self.batch = scorer, tokenizer, render, batch
        self.own = Renderer(tokenizer, eos_ids, style) if tokenizer.eos_token_id is not None else None

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> list[float]:
        """One reward per completion; a truncated completion is scored without an end."""
        ids = [self._ids(row, completion) for row, completion in zip(rows, written, strict=True)]
        return self.scorer(ids, self.batch)

    def _ids(self, row: Prompt, written: Ids) -> Ids:
        prompt, text = row.prompt, self.render.text(written)
        text = self.render.opened(self.render.prompt_ids(prompt, row.template)) + text
        if self.own is None or (not isinstance(prompt, str) and not self.own.chat):
            return list(self.tokenizer(f"{text_of(prompt)}\n{text}", truncation=True)["input_ids"])
        return self.own.read_ids(prompt, text, row.template, ended=self.render.ended(written))


class FunctionReward:
    """Calls a reward function as TRL does: prompts, completions, completion_ids and the other columns by name."""

    def __init__(self, function: Callable[..., Any], name: str, render: Renderer) -> None:
        self.function, self.name, self.render = function, name, render

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> list[float]:
        """One reward per completion; raises PerlError if the function fails or returns anything else."""
        texts = [self.render.text(ids) for ids in written]
        completions = [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        columns = {key: [row.extra.get(key) for row in rows] for key in rows[0].extra}
        prompts = [row.prompt for row in rows]
        try:
            values = self.function(prompts=prompts, completions=completions, completion_ids=list(written), **columns)
            rewards = [float(value) for value in values]
        except Exception as error:  # the user's function can raise anything
            raise PerlError(f"The reward function {self.name} failed: {type(error).__name__}: {error}") from error
        if len(rewards) != len(rows):
            problem = f"The reward function {self.name} returned {len(rewards)} rewards for {len(rows)} completions"
            raise PerlError(problem)
        return rewards


@dataclass(frozen=True)
class Weighted:
    """The weighted sum of several rewards of the same completions, less the `penalty` for a completion that did not end
    by itself, which `ended` decides."""

    rewards: Mapping[str, Scorer]
    weights: Sequence[float]
    penalty: float = 0.0
    ended: Callable[[Ids], bool] = bool

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> Scored:
        """The sum for each completion, and its parts."""
        parts = {name: reward(rows, written) for name, reward in self.rewards.items()}
        total = []
        for ids, rewards in zip(written, zip(*parts.values(), strict=True), strict=True):
            weighted = sum(weight * reward for weight, reward in zip(self.weights, rewards, strict=True))
            total.append(weighted if self.ended(ids) else weighted - self.penalty)
        return Scored(total, parts)

    def bytes(self) -> dict[str, int]:
        """The memory that each reward adds; a function adds none."""
        sizes = dict.fromkeys(self.rewards, 0)
        for name, reward in self.rewards.items():
            scorer = reward.scorer if isinstance(reward, TokenReward | TextReward) else None
            if isinstance(scorer, scorers.SharedScorer | scorers.ClassifierScorer):
                sizes[name] = scorer.bytes
        return sizes


Policy = PeftModel | PreTrainedModel


def attach_all(chosen: Sequence[Reward], model: Policy, prepared: Prepared[Stage], batch: int) -> Weighted:
    """Load the rewards, as adapters on the policy's base if they can share it or as separate models, and note which.
    `batch` is how many rows are scored at a time. Raises PerlError if a reward can't be loaded, or fails its proof."""
    names = _short_names([reward.name for reward in chosen])
    shares = prepared.settings.sampling.reward_weights or (1.0,) * len(chosen)
    rewards: dict[str, Scorer] = {}
    for index, (name, weight, reward) in enumerate(zip(names, shares, chosen, strict=True)):
        adapter = roles.REWARD if index == 0 else f"{roles.REWARD}{index + 1}"
        rewards[name] = attach(reward, model, prepared, batch, adapter)
        if len(chosen) > 1:
            prepared.run.note(f"  weight {weight:g}, reported as rewards/{name}")
    penalty = prepared.settings.rl.missing_eos_penalty if isinstance(prepared.settings, settings.Rl) else None
    return Weighted(rewards, shares, penalty or 0.0, prepared.renderer.ended)


def _short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name if these differ, otherwise the full names."""
    names = [hidden(name) for name in names]  # they become metric names, which TRL writes into checkpoints
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def attach(reward: Reward, model: Policy, prepared: Prepared[Stage], batch: int, adapter: str = roles.REWARD) -> Scorer:
    """Load one reward, as `adapter` if it shares the policy's base. Raises PerlError if it or its proof fails."""
    render, note = prepared.renderer, prepared.run.note
    if reward.function is not None:
        note(f"reward: the function {reward.name}")
        return FunctionReward(reward.function, reward.name, render)
    assert reward.source is not None
    if not reward.is_shared:
        return _load_apart(reward, prepared, batch)
    assert isinstance(model, PeftModel)
    head = scorers.attach_reward(model, str(reward.source.adapter), adapter)
    unread = tokenizers.score_pad(reward.source, trust_remote_code=prepared.settings.model.trust_remote_code)
    scorer = scorers.SharedScorer(model, head, prepared.tokenizer.pad_token_id, unread, adapter)
    note(f"reward: {reward.name}, an adapter on the policy's base (adds {size(scorer.bytes)})")
    reward_model.check_proof(reward.source, scorer, prepared.run, prepared.settings.model)
    return TokenReward(scorer, rendering.as_trained(render, reward.source), batch)


def _load_apart(reward: Reward, prepared: Prepared[Stage], batch: int) -> TokenReward | TextReward:
    source, values, render = reward.source, prepared.settings.model, prepared.renderer
    assert source is not None
    prepared.run.note(f"reward: {source.name}, {reward.apart}, loaded in addition to the policy's")
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=values.trust_remote_code)
    own = reward_model.precision_of(source, values)
    scorer = reward_model.load(source, own)
    reward_model.check_proof(source, scorer, prepared.run, own)
    if tokenizers.tokenizer_fingerprint(tokenizer) == tokenizers.tokenizer_fingerprint(prepared.tokenizer):
        return TokenReward(scorer, rendering.as_trained(render, source), batch)
    style = rendering.own_style(source, tokenizer)
    return TextReward(scorer, tokenizer, render, batch, tokenizers.eos_ids(source), style)
