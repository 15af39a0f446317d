"""What `--reward` names, as something that scores a policy's completions: one reward or a weighted sum of several."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perlcli import device, settings
from perlcli.data import Prompt, Renderer, text_of
from perlcli.data.chat import Style
from perlcli.errors import PerlError
from perlcli.model import adapters, heads, labels, roles, scorers, sources, tokenizers, weights
from perlcli.model.labels import Label
from perlcli.model.sources import Source
from perlcli.redaction import hidden
from perlcli.run import checkpoints
from perlcli.text import size
from perlcli.training import http_reward, rendering, reward_functions, reward_model, reward_names
from perlcli.training.origin import check_adapter, keep_apart
from perlcli.training.prepare import Prepared
from perlcli.training.reward_errors import PATIENCE, OnError, Opinions, Scored
from perlcli.training.reward_functions import Calling, FunctionReward, keyword_arguments, wait_for

PROJECTION = "projection_prng_key"  # seeds the random matrices that all VeRA or RandLoRA adapters of a base share
Ids = list[int]
Model = Callable[[Sequence[Prompt], Sequence[Ids]], list[float]]  # a reward model: one score per completion
Scorer = Model | FunctionReward
Stage = settings.Rl | settings.Eval


@dataclass(frozen=True)
class Reward:
    """A reward that was found but not loaded: a function, or a model on the policy's base or a separate one."""

    name: str
    function: Callable[..., Any] | None = None
    source: Source | None = None
    apart: str | None = None  # why a model can't be an adapter on the policy's base
    label: Label | None = None  # of a model: which of its scores is the reward

    @property
    def is_shared(self) -> bool:
        """Whether the reward is an adapter on the policy's own base."""
        return self.source is not None and self.apart is None

    @property
    def index(self) -> int:
        """The index of the reward in the scores that the model gives."""
        return self.label.index if self.label is not None else 0

    @property
    def words(self) -> str:
        """The reward's name in a note, and its label if the model has several."""
        return f"{self.name}, {self.label.words}" if self.label is not None and self.label.words else self.name

    @property
    def fingerprint(self) -> str:
        """A digest of the model's weights, or of the function's file; empty if there is neither."""
        if self.source is not None:
            return weights.fingerprint(self.source.place)
        function = self.function.func if isinstance(self.function, partial) else self.function
        file = inspect.getsourcefile(inspect.unwrap(function)) if inspect.isfunction(function) else None
        return checkpoints.checksum(Path(file))[:16] if file and Path(file).is_file() else ""


def find_all(prepared: Prepared[Stage]) -> list[Reward]:
    """What each `--reward` names, before weights are loaded. Raises PerlError if there is none, or one is unusable."""
    names = prepared.settings.sampling.reward
    reward_names.check_given(names)
    kwargs = keyword_arguments(prepared.settings.sampling.reward_kwargs, names, reward_names.is_called)
    found = [find(name, prepared, own) for name, own in zip(names, kwargs, strict=True)]
    chosen = labels.choose_all(prepared.settings.sampling.reward_label, [(each.name, each.source) for each in found])
    rewards = [replace(reward, label=label) for reward, label in zip(found, chosen, strict=True)]
    prepared.run.record.model["rewards"] = {reward.name: reward.fingerprint for reward in rewards}
    return rewards


def find(name: str, prepared: Prepared[Stage], kwargs: Mapping[str, Any] | None = None) -> Reward:
    """What one `--reward` names; `kwargs` are its keyword arguments. Raises PerlError if it can't be a reward."""
    if reward_names.is_url(name):
        return Reward(name, function=http_reward.connect(name, kwargs or {}))
    if reward_names.names_function(name):
        return Reward(name, function=reward_functions.find(name, kwargs or {}))
    source = sources.locate(name, option="--reward", trust_remote_code=prepared.settings.model.trust_remote_code)
    if not source.is_classifier:
        what = "an adapter without a reward head" if source.adapter else "a language model"
        raise PerlError(f"--reward {name} is {what}, not a reward model", "train one with `perl reward`")
    heads.is_on_causal(source, full=True, trust_remote_code=prepared.settings.model.trust_remote_code)
    keep_apart(prepared.settings, source)
    apart = _apart(source, prepared)
    _check_record(source, prepared, is_shared=apart is None)
    return Reward(name, source=source, apart=apart)


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

    def __init__(self, scorer: scorers.Scorer, render: Renderer, batch: int, *, shares: bool = False) -> None:
        self.scorer, self.render, self.batch, self.shares = scorer, render, batch, shares

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids]) -> list[float]:
        """One reward per completion; those of one prompt share its forward pass if `shares`."""
        ids = [self.render.scored_ids(row.prompt, ids, row.template) for row, ids in zip(rows, written, strict=True)]
        return self.scorer(ids, self.batch, groups=by_prompt(rows) if self.shares else None)


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


def by_prompt(rows: Sequence[Prompt]) -> list[int]:
    """A number for each row, equal for rows that are the same prompt, in the order of their first: batches are sorted
    by it, and a resumed run must make the same ones."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(row), len(numbers)) for row in rows]


@dataclass(frozen=True)
class Weighted:
    """The weighted sum of several rewards of the same completions, less the `penalty` for a completion that did not end
    by itself, which `ended` decides. `on_error` decides what becomes of completions that can't be scored."""

    rewards: Mapping[str, Scorer]
    weights: Sequence[float]
    penalty: float = 0.0
    ended: Callable[[Ids], bool] = bool
    on_error: OnError = field(default_factory=OnError)

    def __call__(self, rows: Sequence[Prompt], written: Sequence[Ids], calling: Calling | None = None) -> Scored:
        """The sum for each completion, and its parts. A reward that has no opinion (None) is left out of it. Raises
        PerlError for a completion that can't be scored, unless `on_error` says otherwise."""
        return self.on_error.scored(rows, written, partial(self._sum, calling or Calling()))

    def _sum(self, calling: Calling, rows: Sequence[Prompt], written: Sequence[Ids]) -> Scored:
        parts = self._parts(rows, written, calling)
        total = []
        for ids, rewards in zip(written, zip(*parts.values(), strict=True), strict=True):
            known = [weight * each for weight, each in zip(self.weights, rewards, strict=True) if each is not None]
            weighted = sum(known) if known else math.nan
            total.append(weighted if self.ended(ids) else weighted - self.penalty)
        return Scored(total, parts)

    def _parts(self, rows: Sequence[Prompt], written: Sequence[Ids], calling: Calling) -> dict[str, Opinions]:
        """What each reward says, in their order; async functions wait at the same time."""
        slow: dict[str, FunctionReward] = {}
        parts: dict[str, Opinions] = {}
        for name, reward in self.rewards.items():
            if not isinstance(reward, FunctionReward):
                parts[name] = list(reward(rows, written))
            elif reward.is_async:
                slow[name], parts[name] = reward, []
            else:
                with device.fork_rng():  # a function that seeds torch would make all steps sample alike
                    parts[name] = reward(rows, written, calling)
        if slow:
            with device.fork_rng():
                opinions = wait_for(_all_of([reward.judge(rows, written, calling) for reward in slow.values()]))
            parts |= dict(zip(slow, opinions, strict=True))
        return parts

    def bytes(self) -> dict[str, int]:
        """The memory that each reward adds; a function adds none."""
        sizes = dict.fromkeys(self.rewards, 0)
        for name, reward in self.rewards.items():
            scorer = reward.scorer if isinstance(reward, TokenReward | TextReward) else None
            if isinstance(scorer, scorers.SharedScorer | scorers.ClassifierScorer):
                sizes[name] = scorer.bytes
        return sizes


async def _all_of(opinions: Sequence[Coroutine[Any, Any, Opinions]]) -> list[Opinions]:
    """The results of several coroutines, which wait at the same time."""
    return list(await asyncio.gather(*opinions))


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
    is_rl = isinstance(prepared.settings, settings.Rl)
    penalty = prepared.settings.rl.missing_eos_penalty if isinstance(prepared.settings, settings.Rl) else None
    on_error = OnError(prepared.settings.sampling.on_reward_error, prepared.renderer, PATIENCE if is_rl else 1)
    return Weighted(rewards, shares, penalty or 0.0, prepared.renderer.ended, on_error)


def _short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name if these differ, otherwise the full names."""
    names = [hidden(name) for name in names]  # they become metric names, which TRL writes into checkpoints
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def attach(reward: Reward, model: Policy, prepared: Prepared[Stage], batch: int, adapter: str = roles.REWARD) -> Scorer:
    """Load one reward, as `adapter` if it shares the policy's base. Raises PerlError if it or its proof fails."""
    render, note = prepared.renderer, prepared.run.note
    if reward.function is not None:
        note(f"reward: the {'server' if reward_names.is_url(reward.name) else 'function'} {reward.name}")
        return FunctionReward(reward.function, reward.name, render)
    assert reward.source is not None
    if not reward.is_shared:
        return _load_apart(reward, prepared, batch)
    assert isinstance(model, PeftModel)
    head = scorers.attach_reward(model, str(reward.source.adapter), adapter, reward.index)
    unread = tokenizers.score_pad(reward.source, trust_remote_code=prepared.settings.model.trust_remote_code)
    scorer = scorers.SharedScorer(model, head, prepared.tokenizer.pad_token_id, unread, adapter)
    note(f"reward: {reward.words}, an adapter on the policy's base (adds {size(scorer.bytes)})")
    reward_model.check_proof(reward.source, scorer, prepared.run, prepared.settings.model)
    shares = prepared.settings.sharing.shared_prompts
    return TokenReward(scorer, rendering.as_trained(render, reward.source), batch, shares=shares)


def _load_apart(reward: Reward, prepared: Prepared[Stage], batch: int) -> TokenReward | TextReward:
    source, values, render = reward.source, prepared.settings.model, prepared.renderer
    assert source is not None
    prepared.run.note(f"reward: {reward.words}, {reward.apart}, loaded in addition to the policy's")
    tokenizer = tokenizers.load_tokenizer(source, trust_remote_code=values.trust_remote_code)
    own = reward_model.precision_of(source, values)
    scorer = reward_model.load(source, own, reward.index)
    reward_model.check_proof(source, scorer, prepared.run, own)
    if tokenizers.tokenizer_fingerprint(tokenizer) == tokenizers.tokenizer_fingerprint(prepared.tokenizer):
        shares = prepared.settings.sharing.shared_prompts
        return TokenReward(scorer, rendering.as_trained(render, source), batch, shares=shares)
    style = rendering.own_style(source, tokenizer)
    return TextReward(scorer, tokenizer, render, batch, tokenizers.eos_ids(source), style)
