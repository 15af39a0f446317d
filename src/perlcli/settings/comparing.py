"""The settings of `perl compare-full`, which runs other stages with several arms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perlcli.settings import running, sampling, stages
from perlcli.settings.declaring import flag, option, option_of, place
from perlcli.settings.sampling import RlSettings
from perlcli.settings.stages import ATTENTION, Dtype

Compared = Literal["sft", "reward", "rl", "all"]


@dataclass(frozen=True)
class CompareSettings:
    """Comparison"""

    stage: Compared | None = option(
        "What to compare; with all, each stage builds on the one before.", argument=True, unset="required"
    )
    arms: str = option(
        "Training methods to compare, comma-separated: full, or lora or dora, each also with -8bit or -4bit.",
        default="full,lora",
    )
    full_learning_rate: float | None = option(
        "Peak learning rate of full tuning.", unset="a tenth of --learning-rate, as in the paper", gt=0
    )
    repeats: int = option("How often to time each run; the arms take turns.", default=1, gt=0)
    estimate: bool = flag("Only predict each arm's peak memory from the model's config; run nothing.")
    gpu: str | None = option(
        "With --estimate: GPU memory to fit into: 24, 24GB or 24GiB.", unset="the GPU of this machine"
    )


@dataclass(frozen=True)
class ComparedModelSettings:
    """Model"""

    model: str | None = place(
        "Models, comma-separated; each is compared separately.", short="-m", unset="the embedded coffee base"
    )
    dtype: Dtype = option_of(stages.ModelSettings, "dtype")
    trust_remote_code: bool = option_of(stages.ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class ComparedSamplingSettings:
    """Sampling and reward"""

    reward: tuple[str, ...] = option_of(sampling.SamplingSettings, "reward")
    reward_kwargs: tuple[str, ...] = option_of(sampling.SamplingSettings, "reward_kwargs")
    reward_label: tuple[str, ...] = option_of(sampling.SamplingSettings, "reward_label")
    reward_weights: tuple[float, ...] = option_of(sampling.SamplingSettings, "reward_weights")
    temperature: float | None = option_of(sampling.SamplingSettings, "temperature")
    top_p: float | None = option_of(sampling.SamplingSettings, "top_p")
    top_k: int | None = option_of(sampling.SamplingSettings, "top_k")
    min_p: float | None = option_of(sampling.SamplingSettings, "min_p")
    repetition_penalty: float | None = option_of(sampling.SamplingSettings, "repetition_penalty")
    stop: tuple[str, ...] = option_of(sampling.SamplingSettings, "stop")
    min_completion_length: int | None = option_of(sampling.SamplingSettings, "min_completion_length")
    max_completion_length: int | None = option_of(sampling.SamplingSettings, "max_completion_length")


@dataclass(frozen=True)
class ComparedKeepSettings:
    """Run"""

    resume: str | None = option_of(running.KeepSettings, "resume")
    save_steps: int = option_of(running.KeepSettings, "save_steps")
    save_minutes: float = option_of(running.KeepSettings, "save_minutes")
    report_to: str = option_of(running.KeepSettings, "report_to")


@dataclass(frozen=True)
class ComparedLoraSettings:
    """Adapter"""

    lora_r: tuple[int, ...] = option("Ranks, comma-separated; each is a separate arm.", default=(), unset="{}", gt=0)
    lora_alpha: int | None = option_of(stages.LoraSettings, "lora_alpha")
    lora_dropout: float | None = option_of(stages.LoraSettings, "lora_dropout")
    lora_target_modules: str | None = option(
        "Sets of modules, an arm for each: `attention` (every attention projection), `all-linear`, or module names. "
        "attention,all-linear are two sets; q_proj,v_proj is one; semicolons separate any sets.",
        unset=ATTENTION,
    )


@dataclass(frozen=True)
class ComparedRunSettings:
    """Run"""

    output: str | None = option_of(running.RunSettings, "output")
    seed: tuple[int, ...] = option(
        "Seeds, comma-separated; each arm runs once with each seed.", default=(), unset="0", ge=0, lt=2**32
    )
    dry_run: bool = option_of(running.RunSettings, "dry_run")
    overwrite: bool = option_of(running.RunSettings, "overwrite")


@dataclass(frozen=True)
class CompareFull:
    """Compare LoRA with full tuning: memory, speed and quality of each arm, next to the paper's ratios.

    Example: perl compare-full reward --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --lora-r 1,4,16"""

    compare: CompareSettings = CompareSettings()
    model: ComparedModelSettings = ComparedModelSettings()
    data: stages.DataSettings = stages.DataSettings()
    loss: stages.LossSettings = stages.LossSettings()
    held_out: stages.HeldOutSettings = stages.HeldOutSettings()
    thumbs: stages.ThumbsSettings = stages.ThumbsSettings()
    sampling: ComparedSamplingSettings = ComparedSamplingSettings()
    rl: RlSettings = RlSettings()
    lora: ComparedLoraSettings = ComparedLoraSettings()
    train: stages.TrainSettings = stages.TrainSettings()
    recipe: running.RecipeSettings = running.RecipeSettings()
    run: ComparedRunSettings = ComparedRunSettings()
    keep: ComparedKeepSettings = ComparedKeepSettings()
