"""What a user can set: each option's name, type, default and help, written once.

A stage's settings are a frozen dataclass of frozen groups (`settings.lora.lora_r`). Outside, in YAML, on the command
line and in the record, the names are flat (`lora_r`), so each is unique within a stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from perlcli.errors import PerlError, nearest, shorten

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Algorithm = Literal["rloo", "reinforce"]
OnLong = Literal["drop", "truncate", "error"]
Use = Literal["sft", "reward", "rl"]
Compared = Literal["sft", "reward", "rl", "all"]
ATTENTION = "attention"
LATEST = "latest"  # what --resume means where no checkpoint is named
SFT, BASE = "sft", "base"  # the anchors that have a name
ONCE = ("dry_run", "overwrite", "resume")  # steer one call, and are no part of what a run is


def option(
    default: Any, text: str, *, short: str = "", unset: str = "", argument: bool = False, metavar: str = ""
) -> Any:
    """Declare an option; `unset` says in the help what None means, `argument` that it is given by its place alone,
    `metavar` what stands for its value where not its type's word."""
    words = {"help": text, "short": short, "unset": unset, "argument": argument, "metavar": metavar}
    return field(default=default, metadata=words)


def option_of(group: type[Any], name: str) -> Any:
    """Declare an option as another group has it, so that its text stands once."""
    found = next(item for item in dataclasses.fields(group) if item.name == name)
    return field(default=found.default, metadata=found.metadata)


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
    arms: str = option("full,lora", "Ways to train, comma-separated: full, lora, lora-8bit, lora-4bit, dora.")
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
    lora_target_modules: str | None = option_of(LoraSettings, "lora_target_modules")


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


@dataclass(frozen=True)
class Sft:
    """Settings of `perl sft`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class Reward:
    """Settings of `perl reward`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    thumbs: ThumbsSettings = field(default_factory=ThumbsSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class Rl:
    """Settings of `perl rl`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    rl: RlSettings = field(default_factory=RlSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class Eval:
    """Settings of `perl eval`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class Merge:
    """Settings of `perl merge`."""

    merge: MergeSettings = field(default_factory=MergeSettings)
    run: MergeRunSettings = field(default_factory=MergeRunSettings)


@dataclass(frozen=True)
class Quickstart:
    """Settings of `perl quickstart`."""

    quickstart: QuickstartSettings = field(default_factory=QuickstartSettings)
    run: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class CompareFull:
    """Settings of `perl compare-full`."""

    compare: CompareSettings = field(default_factory=CompareSettings)
    model: ComparedModelSettings = field(default_factory=ComparedModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    thumbs: ThumbsSettings = field(default_factory=ThumbsSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    rl: RlSettings = field(default_factory=RlSettings)
    lora: ComparedLoraSettings = field(default_factory=ComparedLoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: ComparedRunSettings = field(default_factory=ComparedRunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class DataCheck:
    """Settings of `perl data check`."""

    file: FileSettings = field(default_factory=FileSettings)
    model: TokenizerSettings = field(default_factory=TokenizerSettings)
    length: LengthSettings = field(default_factory=LengthSettings)


@dataclass(frozen=True)
class DataShow:
    """Settings of `perl data show`."""

    file: FileSettings = field(default_factory=FileSettings)
    show: ShowSettings = field(default_factory=ShowSettings)
    model: TokenizerSettings = field(default_factory=TokenizerSettings)
    length: LengthSettings = field(default_factory=LengthSettings)


@dataclass(frozen=True)
class DataConvert:
    """Settings of `perl data convert`."""

    file: FileSettings = field(default_factory=FileSettings)
    convert: ConvertSettings = field(default_factory=ConvertSettings)
    run: ConvertRunSettings = field(default_factory=ConvertRunSettings)


@dataclass(frozen=True)
class Report:
    """Settings of `perl report`."""

    runs: RunsSettings = field(default_factory=RunsSettings)
    run: ReportRunSettings = field(default_factory=ReportRunSettings)


@dataclass(frozen=True)
class Estimate:
    """Settings of `perl estimate`."""

    estimate: EstimateSettings = field(default_factory=EstimateSettings)
    model: EstimateModelSettings = field(default_factory=EstimateModelSettings)
    train: EstimateTrainSettings = field(default_factory=EstimateTrainSettings)
    rl: EstimateRlSettings = field(default_factory=EstimateRlSettings)


@dataclass(frozen=True)
class Runs:
    """Settings of `perl runs`."""

    runs: ListSettings = field(default_factory=ListSettings)


@dataclass(frozen=True)
class Doctor:
    """Settings of `perl doctor`."""

    doctor: DoctorSettings = field(default_factory=DoctorSettings)


Training = Sft | Reward | Rl
Stage = Training | Eval | Merge | Quickstart | CompareFull
OfData = DataCheck | DataShow | DataConvert
COMMANDS: dict[str, type[Any]] = {
    "sft": Sft, "reward": Reward, "rl": Rl, "eval": Eval, "merge": Merge, "quickstart": Quickstart,
    "compare-full": CompareFull,
}  # fmt: skip

DATA_COMMANDS: dict[str, type[Any]] = {"data check": DataCheck, "data show": DataShow, "data convert": DataConvert}
# They leave no run.
RUNLESS_COMMANDS: dict[str, type[Any]] = {"runs": Runs, "report": Report, "estimate": Estimate, "doctor": Doctor}
ALL_COMMANDS = COMMANDS | RUNLESS_COMMANDS | DATA_COMMANDS

# What an option is where neither the user nor the embedded default says otherwise. Sources: the paper's settings
# (arXiv 2403.10704, section 4 and appendix) for the reward and RL learning rates, beta and temperature; TRL's
# recommendation of ten times the full-tuning rate for LoRA in SFT; TRL's defaults elsewhere.
GENERAL = {
    "max_length": 1024,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "lora_r": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ATTENTION,
    "temperature": 0.7,
    "beta": 0.05,
    "num_generations": 4,
    "max_completion_length": 128,
}
LEARNING_RATES = {"sft": (2e-4, 2e-5), "reward": (1e-4, 1e-5), "rl": (1e-5, 1e-6)}  # LoRA, full tuning
RL_ACCUMULATION = 4


def command_of(settings: Stage | OfData | Report | type[Any]) -> str:
    """The command whose settings these are."""
    kind = settings if isinstance(settings, type) else type(settings)
    return next(name for name, stage in ALL_COMMANDS.items() if stage is kind)


@dataclass(frozen=True)
class Option:
    """One option of a command: where it lives and what the user is told about it."""

    name: str
    group: str
    panel: str
    type: Any
    default: Any
    help: str
    short: str
    unset: str
    argument: bool
    metavar: str


def options(stage: type[Any]) -> Iterator[Option]:
    """Every option of a stage, in the order of its groups."""
    groups = get_type_hints(stage)
    for group in dataclasses.fields(stage):
        kind = groups[group.name]
        types = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            yield Option(item.name, group.name, kind.__doc__, types[item.name], item.default, **item.metadata)


def names(stage: type[Any]) -> list[str]:
    """The names of a stage's options."""
    return [item.name for item in options(stage)]


def build(stage: type[Any], values: Mapping[str, Any]) -> Any:
    """Settings of the stage with these flat values; raises PerlError for a name it doesn't have."""
    known = {item.name: item for item in options(stage)}
    unknown = [name for name in values if name not in known]
    if unknown:
        names = ", ".join(unknown)
        raise PerlError(f"Unknown setting for `perl {command_of(stage)}`: {names}", nearest(unknown[0], known))
    faults = [f"--{dashed(name)} {what}" for name, value in values.items() if (what := misfit(name, value))]
    if faults:
        raise PerlError("\n".join(faults), f"perl {command_of(stage)} --help lists the options")
    groups: dict[str, dict[str, Any]] = {item.group: {} for item in known.values()}
    for name, value in values.items():
        is_one_of_many = isinstance(value, str) and get_origin(known[name].type) is tuple
        groups[known[name].group][name] = (value,) if is_one_of_many else value
    kinds = get_type_hints(stage)
    return stage(**{group: kinds[group](**given) for group, given in groups.items()})


# Options that name a file, a folder or something on the hub.
PLACES = {
    "model", "data", "eval_data", "peft", "output", "recipe", "anchor", "reward", "adapter", "file", "dir", "run",
    "resume",
}  # fmt: skip
LARGEST = 2**53  # of numbers: above it they are no longer exact everywhere
LONGEST_TEXT, LONGEST_NAME = 4096, 255  # bytes: what systems take as a path, and as the name of a file


def misfit(name: str, value: Any) -> str:
    """Why no option can have a value, whichever stage it is of; empty where it can."""
    if isinstance(value, tuple):
        return next((what for item in value if (what := misfit(name, item))), "")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        return f"must be a finite number of at most {LARGEST:,}, not {shorten(value)}"
    return _unusable(value, is_place=name in PLACES) if isinstance(value, str) else ""


def _unusable(text: str, *, is_place: bool) -> str:
    """Why a text can be neither written to a file nor, where it is a place, name one."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return f"must be text in UTF-8, not {shorten(text)}"
    if "\0" in text:
        return f"must be text without NUL characters, not {shorten(text)}"
    if not is_place:
        return ""
    if size > LONGEST_TEXT or max(len(part.encode()) for part in text.split("/")) > LONGEST_NAME:
        return f"is longer than any name of a file: {shorten(text)}"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return f"{shorten(text)}: there is no such home folder"
    return ""


def flat(settings: Stage | OfData | Report) -> dict[str, Any]:
    """The settings as one flat mapping of option names to values."""
    return {item.name: getattr(getattr(settings, item.group), item.name) for item in options(type(settings))}


def resolve(settings: Any, preset: Mapping[str, Any]) -> Any:
    """The same settings with every unset option filled from the preset, else from the general defaults."""
    values = flat(settings)
    command = command_of(settings)
    defaults: dict[str, Any] = {**GENERAL, "output": f"runs/{command}"}
    if command == "rl":
        defaults["gradient_accumulation_steps"] = RL_ACCUMULATION
    if command in LEARNING_RATES:
        defaults["learning_rate"] = LEARNING_RATES[command][1 if values["full"] else 0]
    defaults.update(preset)
    if values.get("algorithm") == "reinforce":
        defaults["num_generations"] = 1
    if values.get("max_steps") is not None or values.get("num_train_epochs") is not None:
        defaults.pop("max_steps", None)  # the user's choice of length, not the preset's
    if values.get("full") or values.get("peft"):
        defaults = {name: value for name, value in defaults.items() if not name.startswith("lora_")}
    for name in values:
        if (values[name] is None or values[name] is False) and name in defaults:
            values[name] = defaults[name]
    if "set" in values:  # a preset's fields, but for those that the user sets otherwise
        named = {item.partition("=")[0] for item in values["set"]}
        kept = (item for item in defaults.get("set", ()) if item.partition("=")[0] not in named)
        values["set"] = (*kept, *values["set"])
    if values.get("algorithm") == "reinforce" and values.get("value_learning_rate", 0) is None:
        values["value_learning_rate"] = values["learning_rate"]
    if values.get("lora_alpha", 0) is None and (values["lora_r"] or 0) > 0 and not values["peft"]:
        values["lora_alpha"] = 2 * values["lora_r"]
    return build(type(settings), values)


LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
POSITIVE = (
    "max_length", "lora_r", "lora_alpha", "max_steps", "num_train_epochs", "learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "temperature", "num_generations",
    "max_completion_length", "max_samples", "per_device_eval_batch_size", "value_learning_rate", "shp_score_ratio",
    "shp_per_post", "rows", "rewards", "max_eval_samples", "repeats", "full_learning_rate", "save_total_limit",
)  # fmt: skip
NOT_NEGATIVE = ("beta", "seed", "missing_eos_penalty")


def check(settings: Stage | OfData) -> None:
    """Raise one PerlError that tells every fault found between and within the values."""
    values = flat(settings)
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    faults = [f"--{dashed(n)} must be above 0, not {v}" for n, v in numbers.items() if n in POSITIVE and not v > 0]
    faults += [
        f"--{dashed(n)} must be 0 or more, not {v}" for n, v in numbers.items() if n in NOT_NEGATIVE and not v >= 0
    ]
    if numbers.get("seed", 0) >= 2**32:
        faults.append(f"--seed must be below {2**32}, not {numbers['seed']}")
    faults += _conflicts(values)
    if faults:
        raise PerlError("\n".join(faults), f"perl {command_of(settings)} --help lists the options")


def _conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        yield "--load-in-4bit and --load-in-8bit exclude each other"
    if values.get("full") and quantised:
        yield "--full trains the weights themselves, so it can't be combined with a 4- or 8-bit base"
    yield from _adapter_conflicts(values)
    if values.get("data") == values.get("eval_data") == "-":
        yield "--data and --eval-data can't both be read from standard input"
    if values.get("overwrite") and values.get("resume"):
        yield "--overwrite and --resume exclude each other"
    if not 0 <= (values.get("lora_dropout") or 0) < 1:
        yield f"--lora-dropout must be from 0 to below 1, not {values['lora_dropout']}"
    yield from _held_out_conflicts(values)
    yield from _reward_conflicts(values)
    yield from _generation_conflicts(values)
    weight = values.get("pos_weight", "none")
    if weight not in ("auto", "none") and not _is_positive(weight):
        yield f"--pos-weight must be auto, none or a number above 0, not {weight}"


def _adapter_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    given = [name for name in LORA if values.get(name)]
    if values.get("full") and (given or values.get("peft")):
        yield "--full uses no adapter, so the --lora options, --use-dora and --peft don't apply"
    elif values.get("peft") and given:
        names = ", ".join(f"--{dashed(name)}" for name in given)
        yield f"--peft {values['peft']} says all of the adapter, so {names} can't be given beside it"


def _held_out_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    fraction = values.get("eval_fraction")
    if fraction is not None and not 0 < fraction < 1:
        yield f"--eval-fraction must be above 0 and below 1, not {fraction:g}"
    if fraction is not None and values.get("eval_data") is not None:
        yield "--eval-data and --eval-fraction exclude each other: either names the held-out rows"


def _reward_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    names, weights = values.get("reward", ()), values.get("reward_weights", ())
    if weights and len(weights) != len(names):
        yield f"--reward-weights has {len(weights)} weights for {len(names)} --reward"
    if not all(math.isfinite(weight) for weight in weights):
        yield f"--reward-weights must be finite numbers, not {', '.join(map(str, weights))}"
    elif weights and not any(weights):
        yield "--reward-weights are all 0: nothing would be learned"
    yield from (f"--reward {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1)


def _algorithm_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    reinforce = values.get("algorithm") == "reinforce"
    count = values.get("num_generations")
    if count == 1 and not reinforce:
        yield "--num-generations must be at least 2: each completion's baseline is the mean of the others"
    if reinforce and count != 1:
        yield f"--algorithm reinforce takes one completion a prompt, not --num-generations {count}"
    if reinforce and values.get("full"):
        yield "--algorithm reinforce has its value model on the frozen base, so it can't be combined with --full"
    if values.get("value_learning_rate") is not None and not reinforce:
        yield "--value-learning-rate is of --algorithm reinforce alone"
    if values.get("anchor") is not None and values.get("beta") == 0:
        yield "--anchor does nothing with --beta 0"


def _generation_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    yield from _algorithm_conflicts(values)
    count = values.get("num_generations")
    if count is None or count <= 0:
        return
    longest, completion = values["max_length"], values["max_completion_length"]
    if longest and completion and longest <= completion:
        yield f"--max-length = {longest} leaves no room for a prompt before --max-completion-length = {completion}"
    size, steps = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    if size and steps and (size * steps) % count:
        yield (
            f"--per-device-train-batch-size x --gradient-accumulation-steps = {size * steps} completions a step "
            f"must be a multiple of --num-generations = {count}"
        )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def dashed(name: str) -> str:
    """The option's name as it is typed: lora_r -> lora-r, and for_ -> for, which Python keeps for itself."""
    return name.rstrip("_").replace("_", "-")
