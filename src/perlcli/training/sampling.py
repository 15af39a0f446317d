"""How a run's settings say that completions are sampled, and what to note about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perlcli import settings
from perlcli.rollouts.how import FULL, Sampling
from perlcli.settings.sampling import SamplingSettings
from perlcli.text import shorten
from perlcli.training import origin
from perlcli.training.prepare import Prepared, filled


def asked(values: SamplingSettings, seed: int) -> Sampling:
    """How to sample by these settings."""
    chosen = {name: getattr(values, name) for name in FULL if getattr(values, name) is not None}
    length, stop = filled(values.max_completion_length), tuple(filter(None, values.stop))
    least = values.min_completion_length or 0
    return Sampling(filled(values.temperature), length, seed, **chosen, stop=stop, min_new_tokens=least)


def note(prepared: Prepared[settings.Rl | settings.Eval]) -> None:
    """Note where KL isn't that of the distribution that is sampled from, and stop strings that were hardly meant."""
    values, run = prepared.settings.sampling, prepared.run
    how = asked(values, 0)
    off = [f"--{settings.dashed(name)} {getattr(how, name):g}" for name in FULL if getattr(how, name) != FULL[name]]
    off += [f"--min-completion-length {how.min_new_tokens}"] * bool(how.min_new_tokens)
    if off:
        kl = "Log-probabilities and KL are those of the full distribution at the temperature"
        run.note(f"{kl}, but completions are sampled with {' '.join(off)}.")
    if isinstance(prepared.settings, settings.Eval):
        _compare_with_run(prepared, values)
    for text in how.stop:
        if escape := next((escape for escape in (r"\n", r"\t") if escape in text), None):
            name = "a newline" if escape == r"\n" else "a tab"
            run.note(f"--stop {text!r} has a backslash, not {name}: in bash, $'{escape}' is {name}.")


def _compare_with_run(prepared: Prepared[Any], values: SamplingSettings) -> None:
    """Note whether an evaluation samples as the RL run that trained its policy did."""
    source = prepared.source
    trained = origin.sampling_settings(prepared.settings, source)
    changed = []
    for name in origin.SAMPLED if trained else ():
        now, then = _shown(name, getattr(values, name)), _shown(name, trained.get(name))
        if now != then:
            changed.append(f"--{settings.dashed(name)} {now}, not {then}")
    if trained:
        words = f"differently from {source.name}: {'; '.join(changed)}" if changed else f"as in {source.name}"
        prepared.run.note(f"Completions are sampled {words}.")


def _shown(name: str, value: float | Sequence[str] | None) -> str:
    """The value of a sampling option in words; unset and off are the same."""
    if name == "stop":
        texts = value if isinstance(value, Sequence) else ()
        return ", ".join(shorten(text) for text in texts if text) or "''"
    return f"{FULL.get(name, 0) if value is None else value:g}"
