"""The groups of options of the other commands: merge, quickstart, compare-full, report, runs, estimate, doctor."""

from __future__ import annotations

from dataclasses import dataclass

from perlcli.settings.choices import ATTENTION, Algorithm, Compared, DataFormat, Dtype, OnLong, Use
from perlcli.settings.declaring import option, option_of
from perlcli.settings.stage_groups import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    RlSettings,
    RunSettings,
    SamplingSettings,
    TrainSettings,
)


@dataclass(frozen=True)
class MergeSettings:
    """Merge"""

    adapter: str | None = option(
        None, "Adapter to merge: folder of a run, or folder or Hub id of a LoRA adapter.", argument=True, place=True
    )
    dtype: Dtype = option(
        "auto",
        "Precision of the merged weights; auto is that of the base in the run (bfloat16 if it was quantised), or as "
        "the base is stored if there is no record of the run.",
    )
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class MergeRunSettings:
    """Run"""

    output: str | None = option(
        None, "Folder for the merged model.", short="-o", unset="ADAPTER-merged, next to the adapter", place=True
    )
    dry_run: bool = option_of(RunSettings, "dry_run")
    overwrite: bool = option_of(RunSettings, "overwrite")


@dataclass(frozen=True)
class FileSettings:
    """Data"""

    file: str | None = option(
        None,
        "Data: local file or folder, Hub id, - for standard input, or coffee for the embedded data.",
        argument=True,
        place=True,
    )
    data_format: DataFormat | None = option_of(DataSettings, "data_format")
    subset: str | None = option_of(DataSettings, "subset")
    split: str | None = option_of(DataSettings, "split")
    shp_score_ratio: float | None = option_of(DataSettings, "shp_score_ratio")
    shp_per_post: int | None = option_of(DataSettings, "shp_per_post")


@dataclass(frozen=True)
class TokenizerSettings:
    """Model"""

    model: str | None = option(
        None,
        "Model or adapter whose tokenizer and chat template render the rows: Hub id or local folder.",
        short="-m",
        unset="the embedded coffee base",
        place=True,
    )
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class LengthSettings:
    """Lengths"""

    max_length: int | None = option_of(DataSettings, "max_length")
    on_long: OnLong = option_of(DataSettings, "on_long")
    max_completion_length: int | None = option(
        None, "Maximum tokens per completion; `perl rl` leaves this much room after each prompt.", unset="128", gt=0
    )


@dataclass(frozen=True)
class ShowSettings:
    """Rows"""

    for_: Use | None = option(None, "Read the data as this stage does.", unset="the first of reward, sft, rl that can")
    rows: int = option(3, "Number of rows to show.", gt=0)


@dataclass(frozen=True)
class ConvertSettings:
    """Rows"""

    for_: Use | None = option_of(ShowSettings, "for_")
    text: bool = option(
        False, "Write plain text instead of messages, if the format allows both (Anthropic HH, Taskmaster)."
    )


@dataclass(frozen=True)
class ConvertRunSettings:
    """Run"""

    output: str | None = option(
        None, "JSONL file to write.", short="-o", unset="FILE-trl.jsonl in the current folder", place=True
    )
    overwrite: bool = option(False, "Replace an existing file.")


@dataclass(frozen=True)
class CompareSettings:
    """Comparison"""

    stage: Compared | None = option(
        None, "What to compare; with all, each stage builds on the one before.", argument=True, unset="required"
    )
    arms: str = option(
        "full,lora",
        "Training methods to compare, comma-separated: full, or lora or dora, each also with -8bit or -4bit.",
    )
    full_learning_rate: float | None = option(
        None, "Peak learning rate of full tuning.", unset="a tenth of --learning-rate, as in the paper", gt=0
    )
    repeats: int = option(1, "How often to time each run; the arms take turns.", gt=0)
    estimate: bool = option(False, "Only predict each arm's peak memory from the model's config; run nothing.")
    gpu: str | None = option(
        None, "With --estimate: GPU memory to fit into: 24, 24GB or 24GiB.", unset="the GPU of this machine"
    )


@dataclass(frozen=True)
class ComparedModelSettings:
    """Model"""

    model: str | None = option(
        None,
        "Models, comma-separated; each is compared separately.",
        short="-m",
        unset="the embedded coffee base",
        place=True,
    )
    dtype: Dtype = option_of(ModelSettings, "dtype")
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class ComparedLoraSettings:
    """Adapter"""

    lora_r: tuple[int, ...] = option((), "Ranks, comma-separated; each is a separate arm.", unset="16", gt=0)
    lora_alpha: int | None = option_of(LoraSettings, "lora_alpha")
    lora_dropout: float | None = option_of(LoraSettings, "lora_dropout")
    lora_target_modules: str | None = option(
        None,
        "Sets of modules, an arm for each: `attention` (every attention projection), `all-linear`, or module names. "
        "attention,all-linear are two sets; q_proj,v_proj is one; semicolons separate any sets.",
        unset=ATTENTION,
    )


@dataclass(frozen=True)
class ComparedRunSettings:
    """Run"""

    output: str | None = option_of(RunSettings, "output")
    seed: tuple[int, ...] = option(
        (), "Seeds, comma-separated; each arm runs once with each seed.", unset="0", ge=0, lt=2**32
    )
    dry_run: bool = option_of(RunSettings, "dry_run")
    overwrite: bool = option_of(RunSettings, "overwrite")


@dataclass(frozen=True)
class RunsSettings:
    """Runs"""

    run: tuple[str, ...] = option(
        (), "Folders of runs to compare, of any stage, or the folder of one comparison.", argument=True, place=True
    )


@dataclass(frozen=True)
class ReportRunSettings:
    """Run"""

    output: str | None = option(
        None,
        "Folder for the report as Markdown, JSON, CSV, plots and one HTML page.",
        short="-o",
        unset="only print the table; for a comparison, its own folder",
        place=True,
    )


@dataclass(frozen=True)
class ListSettings:
    """Runs"""

    dir: str | None = option(
        None,
        "Folder to search for runs, at any depth, or the folder of one run. Without DIR: `runs` in the current folder.",
        argument=True,
        place=True,
        unset="runs",
    )
    watch: bool | None = option(
        None, "Print the table again every two seconds, until Ctrl-C.", unset="on a terminal, until no run is active"
    )
    json: bool = option(False, "Print JSON instead of a table.")


@dataclass(frozen=True)
class DoctorSettings:
    """Doctor"""

    json: bool = option(False, "Print JSON instead of text.")


@dataclass(frozen=True)
class QuickstartSettings:
    """Quickstart"""

    max_steps: int | None = option(None, "Steps of each stage, for a quick trial.", unset="enough to learn", gt=0)
    resume: str | None = option(
        None,
        "Resume an earlier quickstart: stages that finished are kept.",
        unset="start a new run",
        metavar="[latest]",
        place=True,
    )


@dataclass(frozen=True)
class EstimateModelSettings:
    """Model"""

    model: str | None = option(
        None,
        "Model or adapter: Hub id or local folder. Only its config is read.",
        short="-m",
        unset="the embedded coffee base",
        place=True,
    )
    dtype: Dtype = option_of(ModelSettings, "dtype")
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class EstimateSettings:
    """Estimate"""

    stage: Compared = option("all", "What to estimate.", argument=True)
    arms: str = option(
        "full,lora,lora-8bit,lora-4bit",
        "Training methods, comma-separated: full, or lora or dora, each also with -8bit or -4bit.",
    )
    lora_r: str | None = option(None, "Ranks of the adapters, comma-separated.", unset="16")
    lora_target_modules: str | None = option_of(LoraSettings, "lora_target_modules")
    gpu: str | None = option(
        None,
        "GPU memory to fit into: 24, 24GB or 24GiB (a GPU sold as 24 GB has 24 GiB).",
        unset="the GPU of this machine",
    )
    json: bool = option(False, "Print JSON, with sizes in bytes, instead of tables.")


@dataclass(frozen=True)
class EstimateTrainSettings:
    """Training"""

    per_device_train_batch_size: int | None = option_of(TrainSettings, "per_device_train_batch_size")
    gradient_accumulation_steps: int | None = option_of(TrainSettings, "gradient_accumulation_steps")
    max_length: int | None = option(None, "Tokens in each row, prompt and completion together.", unset="1024", gt=0)
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations instead of storing them.", unset="on with a GPU, as in training"
    )


@dataclass(frozen=True)
class EstimateRlSettings:
    """Sampling and reward"""

    algorithm: Algorithm = option_of(RlSettings, "algorithm")
    num_generations: int | None = option_of(RlSettings, "num_generations")
    max_completion_length: int | None = option_of(SamplingSettings, "max_completion_length")
    rewards: int = option(1, "Number of reward models, each an adapter on the same base.", gt=0)
