"""The defaults that depend on the stage, a recipe or an adapter; in the declaration of the option they are None. In a
declaration, `{}` is the place of the default in the help (`words`)."""

from __future__ import annotations

from typing import Any

from perlcli.settings.stages import ATTENTION

# Sources: the paper (arXiv 2403.10704, section 4 and appendix) for the learning rates of reward and RL, beta and
# temperature; TRL's recommendation of ten times the full-tuning rate for LoRA in SFT; TRL's defaults elsewhere.
GENERAL: dict[str, Any] = {
    "max_length": 1024,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "auto",
    "optim": "adamw_torch_fused",
    "lora_r": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ATTENTION,
    "temperature": 0.7,
    "beta": 0.05,
    "num_generations": 4,
    "max_completion_length": 128,
}
LEARNING_RATES = {"sft": (2e-4, 2e-5), "reward": (1e-4, 1e-5), "rl": (1e-5, 1e-6)}  # LoRA, full tuning
STAGES: dict[str, dict[str, Any]] = {"rl": {"gradient_accumulation_steps": 4}}  # where they differ from GENERAL
# The words of the help for what is not a value: of a command, or of all others.
WORDS = {
    "split": {"eval": "test or validation", "": "train"},
    "output": {"eval": "eval-MODEL next to the run", "compare-full": "runs/compare-STAGE"},
}


def of_command(command: str, *, full: bool = False) -> dict[str, Any]:
    """The defaults of a command: those of its stage over the general ones; `full` for full tuning."""
    rates = {"learning_rate": LEARNING_RATES[command][full]} if command in LEARNING_RATES else {}
    return GENERAL | {"output": f"runs/{command}"} | STAGES.get(command, {}) | rates


def words(command: str, name: str) -> str:
    """The default of a command's option for its help: of each stage, where the command runs several that differ."""
    said = WORDS.get(name, {})
    if fixed := said.get(command) or said.get(""):
        return fixed
    if name != "learning_rate":
        shown = _number(of_command(command)[name])
        differing = (
            {} if command in LEARNING_RATES else {stage: own[name] for stage, own in STAGES.items() if name in own}
        )
        return ", ".join([shown, *(f"{stage} {_number(value)}" for stage, value in differing.items())])
    if command not in LEARNING_RATES:
        return ", ".join(f"{stage} {_number(lora)}" for stage, (lora, _) in LEARNING_RATES.items())
    lora, full = LEARNING_RATES[command]
    return f"{_number(lora)}; with --full {_number(full)}"


def _number(value: object) -> str:
    """A default as the help shows it: 1e-5, not 1e-05."""
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
