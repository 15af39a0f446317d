"""The engine of a run: found before weights load, compared with the model once they have, and closed at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from perlcli import settings
from perlcli.model.roles import Model
from perlcli.rollouts import engines, vllm
from perlcli.rollouts.engines import Engine
from perlcli.rollouts.how import Ids
from perlcli.rollouts.merged import Merged
from perlcli.rollouts.vllm import Vllm
from perlcli.run.lifecycle import Run
from perlcli.text import counted, size
from perlcli.training import sampling
from perlcli.training.prepare import Prepared

CAP = 2.0  # of importance weights, as in verl and TRL's GRPO


def find(prepared: Prepared[settings.Rl | settings.Eval], longest: int) -> Engine | None:
    """The engine that the settings name; None for the model in memory. `longest` is the longest prompt with its
    completion, in tokens. Raises PerlError if the engine can't sample from this policy."""
    values, run = prepared.settings, prepared.run
    if values.rollouts.rollouts == "transformers":
        return None
    engine = engines.chosen(values.rollouts, run.folder, prepared.renderer)
    if isinstance(engine, Vllm):
        if prepared.adapter is not None:
            vllm.check_adapter(prepared.adapter)
        for note in engine.connect(prepared.source.base, longest):
            run.note(note)
        run.note(f"Completions are sampled by vLLM: {', '.join(server.url for server in engine.servers)}.")
    elif isinstance(engine, Merged):
        run.note("Completions are sampled with the adapter merged into copies of the projections that it changes.")
    else:
        run.note("Completions are sampled by transformers' continuous batching.")
    return engine


def cap_of(engine: Engine | None, values: settings.Rl) -> float:
    """The cap of importance weights; 0 for none."""
    given = values.importance.importance_cap
    return (CAP if given is None else given) if engine is not None else 0.0


def compare(engine: Engine | None, model: Model, prompts: Sequence[Ids], run: Run) -> None:
    """Compare the base and the adapter on vLLM servers with the run's. Raises RunFailed if they are not the same."""
    if not isinstance(engine, Vllm) or not prompts:
        return
    found = engine.compare(model, prompts)
    run.record.guards["rollouts"] = found
    words = [
        f"{what} by {found[f'{name}_mean']:.2g} (largest {found[f'{name}_max']:.2g})"
        for what, name in (("the bare base", "base"), ("the base with an adapter", "adapter"))
        if f"{name}_mean" in found
    ]
    run.note(f"vLLM's log-probabilities differ from the run's, per token: {', '.join(words)}.")


def note_weights(engine: Engine | None, prepared: Prepared[settings.Rl]) -> None:
    """Note where the engine's rounding can't be corrected for."""
    if (
        engine is None
        or not cap_of(engine, prepared.settings)
        or engine.compares(sampling.asked(prepared.settings.sampling, 0))
    ):
        return
    why = "the engine's log-probabilities are not of the distribution that training computes"
    more = ""
    if isinstance(engine, Vllm) and not engine.is_processed:
        more = ": start vllm with --logprobs-mode processed_logprobs, as perl serve does, or use --temperature 1"
    prepared.run.note(f"Importance weights are off, since {why}{more}.")


@contextmanager
def used(engine: Engine | None, run: Run) -> Iterator[None]:
    """Closes the engine at the end, whatever the end is, and records what it was sent."""
    try:
        yield
    finally:
        if engine is not None:
            engine.close()
        if isinstance(engine, Merged) and engine.most:
            run.note(f"While completions were sampled, merged copies took {size(engine.most)}.")
        if isinstance(engine, Vllm) and engine.generations:
            sent = {"generations": engine.generations, "bytes": engine.bytes_sent}
            run.record.guards["sent"] = sent
            each = size(engine.bytes_sent / engine.generations)
            run.note(f"{counted(engine.generations, 'generation')} by vLLM; each time an adapter of {each} was sent.")
