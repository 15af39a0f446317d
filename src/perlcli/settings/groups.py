"""The groups of options that the commands share, each with its text, written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perlcli.settings.declaring import option, option_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Algorithm = Literal["rloo", "reinforce"]
OnLong = Literal["drop", "truncate", "error"]
Use = Literal["sft", "reward", "rl"]
Compared = Literal["sft", "reward", "rl", "all"]
ATTENTION = "attention"
LATEST = "latest"  # what --resume means where no checkpoint is named
SFT, BASE = "sft", "base"  # the anchors that have a name
ONCE = ("dry_run", "overwrite", "resume")  # steer one call, and are no part of what a run is
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")


@dataclass(frozen=True)
class ModelSettings:
    """Model"""

    model: str | None = option(
        None, "Model or adapter: hub id or local folder.", short="-m", unset="the embedded coffee base"
    )
    dtype: Dtype = option(
        "auto",
        "Precision of the base: float32, bfloat16, float16 or auto (bfloat16 on a GPU or quantised, else float32).",
    )
    load_in_4bit: bool = option(False, "Quantise the frozen base to 4 bits (NF4).")
    load_in_8bit: bool = option(False, "Quantise the frozen base to 8 bits (LLM.int8).")
    trust_remote_code: bool = option(False, "Run the modelling code that a hub repository brings.")
    strict: bool = option(
        False, "Refuse an adapter on its base in another precision than it was trained in, instead of a warning."
    )


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data: str | None = option(
        None,
        "Data: hub id, local file or folder, or - for standard input.",
        short="-d",
        unset="the embedded coffee data",
    )
    data_format: str | None = option(
        None, "Name of the rows' format, of --eval-data's too; the README lists them.", unset="found from the columns"
    )
    subset: str | None = option(
        None, "Subset of a hub data set: a configuration or a folder of it.", unset="the default one"
    )
    split: str | None = option(None, "Split of a hub data set or of a folder.", unset="train; eval: test or validation")
    shp_score_ratio: float | None = option(
        None, "Format shp: least ratio of the two comments' scores; its card takes 2.", unset="no limit"
    )
    shp_per_post: int | None = option(None, "Format shp: most pairs of one post; its card takes 5.", unset="no limit")
    max_length: int | None = option(
        None,
        "Longest row in tokens, prompt and completion together; --on-long says what becomes of longer ones.",
        unset="1024",
    )
    on_long: OnLong = option(
        "drop",
        "Rows above --max-length: drop (left out, counted), truncate (the prompt is cut from the left, the completion "
        "stays whole) or error.",
    )
    drop_duplicates: bool = option(False, "Leave out rows that repeat an earlier one; they are counted in any case.")


@dataclass(frozen=True)
class HeldOutSettings:
    """Data"""

    eval_data: str | None = option(
        None, "Held-out data, measured at the end.", unset="the test split of --data, where it has one"
    )
    eval_fraction: float | None = option(
        None, "Share of --data held out instead, all rows of a prompt on one side, chosen by content.", unset="none"
    )
    max_eval_samples: int | None = option(None, "Most held-out rows to measure on, the first ones.", unset="all")


@dataclass(frozen=True)
class LoraSettings:
    """Adapter"""

    lora_r: int | None = option(None, "Rank of the LoRA matrices.", unset="16")
    lora_alpha: int | None = option(None, "LoRA scaling numerator (scale = alpha / r).", unset="2 x lora-r")
    lora_dropout: float | None = option(None, "Dropout before the LoRA matrices.", unset="0")
    lora_target_modules: str | None = option(
        None,
        "`attention` (every attention projection), `all-linear`, or module names, comma-separated.",
        unset=ATTENTION,
    )
    use_dora: bool = option(
        False, "DoRA: the LoRA matrices learn the direction of each weight, and a vector beside them its magnitude."
    )
    peft: str | None = option(
        None,
        "Another adapter instead of what the --lora options say: a JSON file like peft's adapter_config.json (LoHa, "
        "LoKr, …; docs/adapters.md).",
        unset="LoRA",
    )
    full: bool = option(False, "Train every parameter and use no adapter.")


@dataclass(frozen=True)
class TrainSettings:
    """Training"""

    max_steps: int | None = option(None, "Optimiser steps; overrides the epochs.", unset="by epochs")
    num_train_epochs: float | None = option(None, "Passes over the data.", unset="1")
    learning_rate: float | None = option(None, "Peak learning rate.", unset="by stage")
    per_device_train_batch_size: int | None = option(None, "Rows (rl: completions) per device and pass.", unset="8")
    gradient_accumulation_steps: int | None = option(None, "Passes per optimiser step.", unset="by stage")
    set: tuple[str, ...] = option((), "NAME=VALUE for any other field of the TRL config in use; repeatable.")


@dataclass(frozen=True)
class RecipeSettings:
    """Run"""

    recipe: str | None = option(
        None,
        "Values of one of the paper's tasks, by name (`perl recipes` lists them) or YAML file; --config and the "
        "command line win.", unset="none",
    )  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    output: str | None = option(
        None, "Folder that the run leaves.", short="-o", unset="runs/COMMAND; eval: eval-MODEL beside the run"
    )
    seed: int = option(0, "Seed of initialisation, data order and sampling.")
    dry_run: bool = option(False, "Resolve, validate and print; load no weights, train nothing, write nothing.")
    overwrite: bool = option(False, "Replace a non-empty output folder.")


@dataclass(frozen=True)
class KeepSettings:
    """Run"""

    resume: str | None = option(
        None, "Go on from the output folder's last whole checkpoint, or from the CHECKPOINT named behind it.",
        unset="a new run", metavar="[CHECKPOINT]",
    )  # fmt: skip
    save_steps: int = option(500, "Steps between checkpoints, for --resume.")
    save_total_limit: int = option(2, "Checkpoints to keep, the newest.")
    report_to: str = option("none", "Trackers as transformers names them (tensorboard, wandb, …), comma-separated.")


@dataclass(frozen=True)
class ThumbsSettings:
    """Thumbs"""

    pos_weight: str | float = option(
        "auto", "Weight of thumbs-up rows in the loss: auto (thumbs down per thumb up), a number, or none."
    )


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling and reward"""

    reward: tuple[str, ...] = option(
        (),
        "What scores completions: adapter folder of `perl reward`, module:function, or a sequence classifier; "
        "repeatable, then their weighted sum counts.",
    )
    reward_weights: tuple[float, ...] = option(
        (), "A weight for each --reward, in their order, comma-separated.", unset="1 each"
    )
    temperature: float | None = option(None, "Sampling temperature.", unset="0.7, as the paper")
    max_completion_length: int | None = option(None, "Longest completion in tokens.", unset="128")


@dataclass(frozen=True)
class RlSettings:
    """Sampling and reward"""

    algorithm: Algorithm = option(
        "rloo",
        "rloo (baseline: the mean of the prompt's other completions) or reinforce (the paper's: one completion a "
        "prompt, baseline from a value model, an adapter of its own on the same base).",
    )
    num_generations: int | None = option(None, "Completions per prompt.", unset="4, reinforce: 1")
    beta: float | None = option(None, "Weight of the KL penalty towards the anchor.", unset="0.05, as the paper")
    anchor: str | None = option(
        None, "What the KL penalty holds the policy to: sft (the policy that RL starts from), base, or a policy's "
        "folder on the same base.", unset=SFT,
    )  # fmt: skip
    missing_eos_penalty: float | None = option(
        None, "Taken off the reward of a completion that did not end by itself.", unset="none"
    )
    value_learning_rate: float | None = option(
        None, "Peak learning rate of reinforce's value model.", unset="as --learning-rate"
    )


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation"""

    max_samples: int | None = option(None, "Rows to evaluate at most.", unset="all; 256 prompts for a policy")
    per_device_eval_batch_size: int | None = option(None, "Rows per pass.", unset="16")


@dataclass(frozen=True)
class MergeSettings:
    """Merge"""

    adapter: str | None = option(
        None, "Adapter to merge: folder of a run, or a LoRA adapter's folder or hub id.", argument=True
    )
    dtype: Dtype = option(
        "auto",
        "Precision of the merged weights: float32, bfloat16, float16 or auto (as the run held its base, bfloat16 for "
        "a quantised one; as the base is stored where no record tells).",
    )
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class MergeRunSettings:
    """Run"""

    output: str | None = option(
        None, "Folder that the merged model goes to.", short="-o", unset="ADAPTER-merged, beside the adapter"
    )
    dry_run: bool = option_of(RunSettings, "dry_run")
    overwrite: bool = option_of(RunSettings, "overwrite")


@dataclass(frozen=True)
class FileSettings:
    """Data"""

    file: str | None = option(
        None,
        "Data: local file or folder, hub id, - for standard input, or coffee for the embedded data.",
        argument=True,
    )
    data_format: str | None = option_of(DataSettings, "data_format")
    subset: str | None = option_of(DataSettings, "subset")
    split: str | None = option_of(DataSettings, "split")
    shp_score_ratio: float | None = option_of(DataSettings, "shp_score_ratio")
    shp_per_post: int | None = option_of(DataSettings, "shp_per_post")


@dataclass(frozen=True)
class TokenizerSettings:
    """Model"""

    model: str | None = option(
        None, "Model or adapter whose tokenizer and chat template render the rows: hub id or local folder.", short="-m",
        unset="the embedded coffee base",
    )  # fmt: skip
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class LengthSettings:
    """Lengths"""

    max_length: int | None = option_of(DataSettings, "max_length")
    on_long: OnLong = option_of(DataSettings, "on_long")
    max_completion_length: int | None = option(
        None, "Longest completion in tokens: a prompt of perl rl leaves as much room.", unset="128"
    )


@dataclass(frozen=True)
class ShowSettings:
    """Rows"""

    for_: Use | None = option(
        None, "Stage as which to read the data: sft, reward or rl.", unset="the first of reward, sft, rl that can"
    )
    rows: int = option(3, "Rows to show.")


@dataclass(frozen=True)
class ConvertSettings:
    """Rows"""

    for_: Use | None = option_of(ShowSettings, "for_")
    text: bool = option(
        False, "Plain text instead of messages, where the format can be either (Anthropic HH, Taskmaster)."
    )


@dataclass(frozen=True)
class ConvertRunSettings:
    """Run"""

    output: str | None = option(None, "JSONL file to write.", short="-o", unset="FILE-trl.jsonl, in this folder")
    overwrite: bool = option(False, "Replace a file that is there.")


@dataclass(frozen=True)
class CompareSettings:
    """Comparison"""

    stage: Compared | None = option(
        None, "What to compare: sft, reward, rl, or all, where each stage builds on the one before.", argument=True,
        unset="must be given",
    )  # fmt: skip
    arms: str = option("full,lora", "Ways to train, comma-separated: full; lora or dora, each also -8bit or -4bit.")
    full_learning_rate: float | None = option(
        None, "Peak learning rate of full tuning.", unset="a tenth of --learning-rate, as in the paper"
    )
    repeats: int = option(1, "How often each run is timed; arms take turns.")
    estimate: bool = option(False, "Predict each arm's peak memory from the model's config alone, and run nothing.")
    gpu: str | None = option(
        None, "With --estimate: memory of the GPU to fit on: 24, 24GB or 24GiB.", unset="the GPU at hand"
    )


@dataclass(frozen=True)
class ComparedModelSettings:
    """Model"""

    model: str | None = option(
        None, "Models, comma-separated; each is compared on its own.", short="-m", unset="the embedded coffee base"
    )
    dtype: Dtype = option_of(ModelSettings, "dtype")
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class ComparedLoraSettings:
    """Adapter"""

    lora_r: tuple[int, ...] = option((), "Ranks, comma-separated: an arm for each.", unset="16")
    lora_alpha: int | None = option_of(LoraSettings, "lora_alpha")
    lora_dropout: float | None = option_of(LoraSettings, "lora_dropout")
    lora_target_modules: str | None = option(
        None,
        "Sets of modules, an arm for each: `attention` (every attention projection), `all-linear`, or module names; "
        "attention,all-linear are two sets, q_proj,v_proj is one, and semicolons separate any sets.",
        unset=ATTENTION,
    )


@dataclass(frozen=True)
class ComparedRunSettings:
    """Run"""

    output: str | None = option_of(RunSettings, "output")
    seed: tuple[int, ...] = option((), "Seeds, comma-separated: each arm runs once with each.", unset="0")
    dry_run: bool = option_of(RunSettings, "dry_run")
    overwrite: bool = option_of(RunSettings, "overwrite")


@dataclass(frozen=True)
class RunsSettings:
    """Runs"""

    run: tuple[str, ...] = option(
        (), "Folders of runs, of any stage, to hold side by side; or the folder of one comparison.", argument=True
    )


@dataclass(frozen=True)
class ReportRunSettings:
    """Run"""

    output: str | None = option(
        None, "Folder for the report as Markdown, JSON, CSV, pictures and one HTML page.", short="-o",
        unset="print the table alone; of a comparison, its own folder",
    )  # fmt: skip


@dataclass(frozen=True)
class ListSettings:
    """Runs"""

    dir: str | None = option(
        None, "Folder whose runs to list, at any depth, or that of one run; `runs` in this folder if not given.",
        argument=True,
    )  # fmt: skip
    watch: bool | None = option(
        None, "Print the table again every two seconds, until Ctrl-C.",
        unset="on a terminal, until no run is at work any more",
    )  # fmt: skip
    json: bool = option(False, "Print JSON instead of a table.")


@dataclass(frozen=True)
class DoctorSettings:
    """Doctor"""

    json: bool = option(False, "Print JSON instead of lines.")


@dataclass(frozen=True)
class QuickstartSettings:
    """Quickstart"""

    max_steps: int | None = option(None, "Steps of each stage, to try the plumbing.", unset="what teaches")
    resume: str | None = option(
        None, "Go on where an earlier call stopped: its finished stages stay.", unset="a new run", metavar="[latest]",
    )  # fmt: skip


@dataclass(frozen=True)
class EstimateModelSettings:
    """Model"""

    model: str | None = option(
        None, "Model or adapter, of which only the config is read: hub id or local folder.", short="-m",
        unset="the embedded coffee base",
    )  # fmt: skip
    dtype: Dtype = option_of(ModelSettings, "dtype")
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class EstimateSettings:
    """Estimate"""

    stage: str = option("all", "What to estimate: sft, reward, rl or all.", argument=True)
    arms: str = option(
        "full,lora,lora-8bit,lora-4bit", "Ways to train, comma-separated: full; lora, dora, each also -8bit or -4bit.",
    )  # fmt: skip
    lora_r: str | None = option(None, "Ranks of the adapters, comma-separated.", unset="16")
    lora_target_modules: str | None = option_of(LoraSettings, "lora_target_modules")
    gpu: str | None = option(
        None, "Memory of the GPU to fit on: 24, 24GB or 24GiB (a GPU sold as 24 GB has 24 GiB).",
        unset="the GPU at hand",
    )  # fmt: skip
    json: bool = option(False, "Print JSON, in bytes, instead of tables.")


@dataclass(frozen=True)
class EstimateTrainSettings:
    """Training"""

    per_device_train_batch_size: int | None = option_of(TrainSettings, "per_device_train_batch_size")
    gradient_accumulation_steps: int | None = option_of(TrainSettings, "gradient_accumulation_steps")
    max_length: int | None = option(None, "Tokens of every row, prompt and completion together.", unset="1024")
    gradient_checkpointing: bool | None = option(
        None, "Compute activations again instead of keeping them.", unset="on for a GPU, as in training"
    )


@dataclass(frozen=True)
class EstimateRlSettings:
    """Sampling and reward"""

    algorithm: Algorithm = option_of(RlSettings, "algorithm")
    num_generations: int | None = option_of(RlSettings, "num_generations")
    max_completion_length: int | None = option_of(SamplingSettings, "max_completion_length")
    rewards: int = option(1, "Reward models, each an adapter on the one base.")
