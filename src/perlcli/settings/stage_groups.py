"""The groups of options of the stages: sft, reward, rl and eval."""

from __future__ import annotations

from dataclasses import dataclass

from perlcli.settings.choices import ATTENTION, SFT, Algorithm, DataFormat, Dtype, OnLong
from perlcli.settings.declaring import option


@dataclass(frozen=True)
class ModelSettings:
    """Model"""

    model: str | None = option(
        None, "Model or adapter: Hub id or local folder.", short="-m", unset="the embedded coffee base", place=True
    )
    dtype: Dtype = option(
        "auto", "Precision of the base; auto is bfloat16 on a GPU or when quantised, float32 otherwise."
    )
    load_in_4bit: bool = option(False, "Quantise the frozen base to 4 bits (NF4).")
    load_in_8bit: bool = option(False, "Quantise the frozen base to 8 bits (LLM.int8).")
    trust_remote_code: bool = option(False, "Run modelling code from the Hub repository.")
    strict: bool = option(
        False,
        "Stop instead of warning if an adapter is used on its base in a different precision than it was trained in.",
    )


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data: str | None = option(
        None,
        "Data: Hub id, local file or folder, or - for standard input.",
        short="-d",
        unset="the embedded coffee data",
        place=True,
    )
    data_format: DataFormat | None = option(
        None, "Format of the rows, held-out data included.", unset="detected from the columns"
    )
    subset: str | None = option(None, "Subset of a Hub dataset: a configuration or a folder.", unset="the default one")
    split: str | None = option(None, "Split of a Hub dataset or of a folder.", unset="train; eval: test or validation")
    shp_score_ratio: float | None = option(
        None,
        "Format shp: minimum ratio between the scores of the two comments; the dataset card uses 2.",
        unset="no limit",
        gt=0,
    )
    shp_per_post: int | None = option(
        None, "Format shp: maximum number of pairs per post; the dataset card uses 5.", unset="no limit", gt=0
    )
    max_length: int | None = option(
        None, "Maximum tokens per row, prompt and completion together; see --on-long.", unset="1024", gt=0
    )
    on_long: OnLong = option(
        "drop",
        "What to do with rows longer than --max-length: drop them and report how many, truncate the prompt from the "
        "left (the completion is never cut), or stop with an error.",
    )
    drop_duplicates: bool = option(False, "Drop rows that repeat an earlier one. Duplicates are always counted.")


@dataclass(frozen=True)
class HeldOutSettings:
    """Data"""

    eval_data: str | None = option(
        None, "Held-out data to evaluate on at the end.", unset="the test split of --data, if it has one", place=True
    )
    eval_fraction: float | None = option(
        None,
        "Hold out this share of --data instead. Rows are chosen by content, and rows with the same prompt stay "
        "together.",
        unset="none",
        gt=0,
        lt=1,
    )
    max_eval_samples: int | None = option(
        None, "Evaluate on at most this many held-out rows (the first ones).", unset="all", gt=0
    )


@dataclass(frozen=True)
class LoraSettings:
    """Adapter"""

    lora_r: int | None = option(None, "Rank of the LoRA matrices.", unset="16", gt=0)
    lora_alpha: int | None = option(
        None, "Numerator of the LoRA scale (scale = alpha / r).", unset="2 x --lora-r", gt=0
    )
    lora_dropout: float | None = option(None, "Dropout before the LoRA matrices.", unset="0", ge=0, lt=1)
    lora_target_modules: str | None = option(
        None,
        "Modules to adapt: `attention` (all attention projections), `all-linear`, or module names, comma-separated.",
        unset=ATTENTION,
    )
    use_dora: bool = option(
        False, "DoRA: the LoRA matrices learn the direction of each weight, and an extra vector learns its magnitude."
    )
    peft: str | None = option(
        None,
        "Use another adapter type instead of the --lora options: a JSON file like peft's adapter_config.json (LoHa, "
        "LoKr, …; see docs/adapters.md).",
        unset="LoRA",
        place=True,
    )
    full: bool = option(False, "Train all parameters, without an adapter.")


@dataclass(frozen=True)
class TrainSettings:
    """Training"""

    max_steps: int | None = option(
        None, "Number of optimiser steps; overrides --num-train-epochs.", unset="by epochs", gt=0
    )
    num_train_epochs: float | None = option(None, "Passes over the data.", unset="1", gt=0)
    learning_rate: float | None = option(None, "Peak learning rate.", unset="depends on the stage", gt=0)
    per_device_train_batch_size: int | None = option(
        None, "Batch size per device, in rows (rl: in completions).", unset="8", gt=0
    )
    gradient_accumulation_steps: int | None = option(
        None, "Batches per optimiser step.", unset="depends on the stage", gt=0
    )
    set: tuple[str, ...] = option(
        (), "Any other field of TRL's config; can be given several times.", metavar="NAME=VALUE"
    )


@dataclass(frozen=True)
class RecipeSettings:
    """Run"""

    recipe: str | None = option(
        None,
        "Start from the settings of one of the paper's tasks: a name (see `perl recipes`) or a YAML file. --config "
        "and the command line override them.",
        unset="none",
        place=True,
    )


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    output: str | None = option(
        None,
        "Output folder of the run.",
        short="-o",
        unset="runs/COMMAND; eval: eval-MODEL next to the run",
        place=True,
    )
    seed: int = option(0, "Seed for initialisation, data order and sampling.", ge=0, lt=2**32)
    dry_run: bool = option(False, "Only check and print the settings: load no weights, train nothing, write nothing.")
    overwrite: bool = option(False, "Replace a non-empty output folder.")


@dataclass(frozen=True)
class KeepSettings:
    """Run"""

    resume: str | None = option(
        None,
        "Resume from the last complete checkpoint in the output folder, or from the given CHECKPOINT.",
        unset="start a new run",
        metavar="[CHECKPOINT]",
        place=True,
    )
    save_steps: int = option(500, "Steps between checkpoints.", gt=0)
    save_total_limit: int = option(2, "Number of checkpoints to keep (the newest).", gt=0)
    report_to: str = option(
        "none", "Experiment trackers, comma-separated, named as in transformers (tensorboard, wandb, …)."
    )


@dataclass(frozen=True)
class ThumbsSettings:
    """Thumbs"""

    pos_weight: str | float = option(
        "auto",
        "Weight of thumbs-up rows in the loss; auto is the number of thumbs down per thumb up.",
        metavar="[auto|none|X]",
    )


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling and reward"""

    reward: tuple[str, ...] = option(
        (),
        "What scores completions: folder of a `perl reward` run, module:function, or a sequence classifier. Can be "
        "given several times, for a weighted sum.",
        place=True,
    )
    reward_weights: tuple[float, ...] = option(
        (), "Weights of the --reward options, in the same order, comma-separated.", unset="1 each"
    )
    temperature: float | None = option(None, "Sampling temperature.", unset="0.7, as in the paper", gt=0)
    max_completion_length: int | None = option(None, "Maximum tokens per completion.", unset="128", gt=0)


@dataclass(frozen=True)
class RlSettings:
    """Sampling and reward"""

    algorithm: Algorithm = option(
        "rloo",
        "rloo: the baseline is the mean of the prompt's other completions. reinforce, as in the paper: one completion "
        "per prompt, and the baseline comes from a value model, a separate adapter on the same base.",
    )
    num_generations: int | None = option(None, "Completions per prompt.", unset="4, reinforce: 1", gt=0)
    beta: float | None = option(
        None, "Weight of the KL penalty towards the anchor.", unset="0.05, as in the paper", ge=0
    )
    anchor: str | None = option(
        None,
        "Reference model of the KL penalty: sft (the policy that RL starts from), base, or the folder of a policy on "
        "the same base.",
        unset=SFT,
        place=True,
    )
    missing_eos_penalty: float | None = option(
        None, "Subtracted from the reward of a completion that has no end-of-sequence token.", unset="none", ge=0
    )
    value_learning_rate: float | None = option(
        None,
        "Peak learning rate of the value model, with --algorithm reinforce.",
        unset="same as --learning-rate",
        gt=0,
    )


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation"""

    max_samples: int | None = option(
        None, "Evaluate on at most this many rows.", unset="all; 256 prompts for a policy", gt=0
    )
    per_device_eval_batch_size: int | None = option(None, "Batch size per device.", unset="16", gt=0)
