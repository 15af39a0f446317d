"""Whether the roles on one base do what separate models would, on the embedded base and in each precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_work
import torch

from perlcli.doctor import precisions
from perlcli.model import loading, roles, scorers, sources, tokenizers
from perlcli.settings import ModelSettings

CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "bf16": (("--dtype", "bfloat16"), "rloo"),
    "4-bit": (("--load-in-4bit",), "reinforce"),
    "8-bit": (("--load-in-8bit",), "rloo"),
    "fp16": (("--dtype", "float16"), "rloo"),
    "DoRA on 4 bits": (("--load-in-4bit", "--use-dora"), "rloo"),
}
PRECISIONS = {
    "bf16": ModelSettings(dtype="bfloat16"),
    "4-bit": ModelSettings(load_in_4bit=True),
    "8-bit": ModelSettings(load_in_8bit=True),
}
ROWS = [[1, 40, 41, 42, 2], [1, 50], [1, 60, 61, 62, 63, 64, 65, 66, 2, 201]]  # token ids


def check(place: Path, *, gpu: bool) -> dict[str, Any]:
    """A reward model and RL against it in each case, then scores and gradients; a fault ends only its own case."""
    checks: dict[str, bool] = {}
    notes: list[str] = []
    for name, (words, algorithm) in CASES.items():
        if name == "fp16" and not gpu:
            continue
        folder = place / name.replace(" ", "-")
        parts = [lambda words=words, algorithm=algorithm, folder=folder: runs(folder, words, algorithm)]
        if name in PRECISIONS:
            settings = PRECISIONS[name]
            parts.append(lambda settings=settings, folder=folder: scores(settings, folder / "reward"))
            parts.append(lambda settings=settings, folder=folder: gradients(settings, folder / "reward"))
        for part in parts:
            try:
                found, note = part()
            except (Exception, SystemExit) as error:
                found, note = {"runs": False}, f"{type(error).__name__}: {error}"[:300]
            checks |= {f"{name}: {what}": holds for what, holds in found.items()}
            notes += [f"{name}: {note}"] if note else []
    return {"checks": checks, "notes": notes}


def runs(folder: Path, words: tuple[str, ...], algorithm: str) -> tuple[dict[str, bool], str]:
    """`perl reward` and `perl rl` against it: what their own guards found."""
    few = ("--max-steps", 3, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 1)
    own = gpu_work.perl("reward", *words, *few, "--max-eval-samples", 8, output=folder / "reward")
    generations = () if algorithm == "reinforce" else ("--num-generations", 4)
    against = ("--reward", folder / "reward", "--max-completion-length", 16, "--algorithm", algorithm, *generations)
    record = gpu_work.perl("rl", *words, *against, *few, output=folder / "rl")
    guards = record["guards"]
    shift = max(value for name, value in guards.items() if name.startswith("shift of "))
    found = {
        "the saved reward model gives the same scores": own["metrics"]["reload_shift"] == 0,
        "KL is 0 at the start": guards["kl_at_start"] == 0,
        "one copy of the base": record["memory"]["base_copies"] == 1,
        "only policy and value model changed": {"base", "reward"} <= set(guards["unchanged"]),
    }
    return found, f"KL {guards['kl_at_start']:.3g} at the start, scores of the reward shift by {shift:.3g} in RL"


def scores(settings: ModelSettings, reward: Path) -> tuple[dict[str, bool], str]:
    """Scores of the reward adapter on the policy's base, and of the reward model on a base of its own."""
    source = sources.locate(None)
    pad = int(tokenizers.load_tokenizer(source).pad_token_id)
    policy: Any = precisions.adapted(settings)
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, str(reward)), pad)(ROWS)
    model = roles.load_adapter(loading.load_classifier(source, settings, pad), str(reward), trainable=False)
    own = scorers.ClassifierScorer(model, pad)(ROWS)
    off = max(abs(one - other) for one, other in zip(shared, own, strict=True))
    return {"one base scores like two": off == 0}, f"scores differ by {off:.3g}" if off else ""


def gradients(settings: ModelSettings, reward: Path) -> tuple[dict[str, bool], str]:
    """Gradients of the policy with and without a reward adapter next to it, after the reward has scored."""
    policy: Any = precisions.adapted(settings)
    _, wanted = precisions.passes(policy, torch.bfloat16)
    policy.zero_grad(set_to_none=True)
    shared = scorers.SharedScorer(policy, scorers.attach_reward(policy, str(reward)), pad=0)
    roles.keep_only_policy_trainable(policy)
    shared(ROWS)
    _, found = precisions.passes(policy, torch.bfloat16)
    has_gradient = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    cosine = float(torch.nn.functional.cosine_similarity(found, wanted, dim=0))
    results = {
        "only the policy gets gradients": all(roles.is_of(roles.POLICY, name) for name in has_gradient),
        "a reward next to it doesn't change the policy's gradients": cosine > 0.9999,
    }
    return results, "" if torch.equal(found, wanted) else f"gradients with and without a reward: cosine {cosine:.6f}"
