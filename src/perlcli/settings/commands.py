"""The settings of the other commands, each with its groups, and the table of all commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perlcli.settings import running, sampling, stages
from perlcli.settings.comparing import Compared, CompareFull
from perlcli.settings.declaring import flag, option, option_of, place
from perlcli.settings.sampling import Algorithm
from perlcli.settings.stages import Checkpointing, DataFormat, Dtype, OnLong, Pairs, Use


@dataclass(frozen=True)
class MergeSettings:
    """Merge"""

    adapter: str | None = place(
        "Adapter to merge: folder of a run, or folder or Hub id of a LoRA adapter.", argument=True
    )
    dtype: Dtype = option(
        "Precision of the merged weights; auto is the precision that the base is stored in, also if it was quantised "
        "or had another precision in training.",
        default="auto",
    )
    trust_remote_code: bool = option_of(stages.ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class MergeRunSettings:
    """Run"""

    output: str | None = place("Folder for the merged model.", short="-o", unset="ADAPTER-merged, next to the adapter")
    dry_run: bool = option_of(running.RunSettings, "dry_run")
    overwrite: bool = option_of(running.RunSettings, "overwrite")


@dataclass(frozen=True)
class Merge:
    """Merge an adapter into its base: gives an ordinary model that plain transformers can load.

    Example: perl merge runs/rl --output runs/rl-merged"""

    merge: MergeSettings = MergeSettings()
    run: MergeRunSettings = MergeRunSettings()


@dataclass(frozen=True)
class QuickstartSettings:
    """Quickstart"""

    max_steps: int | None = option("Steps of each stage, for a quick trial.", unset="enough to learn", gt=0)
    resume: str | None = place(
        "Resume an earlier quickstart: stages that finished are kept.", unset="start a new run", metavar="[latest]"
    )


@dataclass(frozen=True)
class Quickstart:
    """Watch a tiny model learn from preferences in a few minutes: SFT, reward, RL and evaluation; needs no GPU.

    Example: perl quickstart"""

    quickstart: QuickstartSettings = QuickstartSettings()
    run: running.RunSettings = running.RunSettings()


@dataclass(frozen=True)
class FileSettings:
    """Data"""

    file: str | None = place(
        "Data: local file or folder, Hub id, - for standard input, or coffee for the embedded data.", argument=True
    )
    data_format: DataFormat | None = option_of(stages.DataSettings, "data_format")
    columns: str | None = option_of(stages.DataSettings, "columns")
    label_map: str | None = option_of(stages.DataSettings, "label_map")
    label_threshold: float | None = option_of(stages.DataSettings, "label_threshold")
    score_field: str | None = option_of(stages.DataSettings, "score_field")
    pairs: Pairs = option_of(stages.DataSettings, "pairs")
    subset: str | None = option_of(stages.DataSettings, "subset")
    split: str | None = option_of(stages.DataSettings, "split")
    shp_score_ratio: float | None = option_of(stages.DataSettings, "shp_score_ratio")
    shp_per_post: int | None = option_of(stages.DataSettings, "shp_per_post")


@dataclass(frozen=True)
class LengthSettings:
    """Lengths"""

    max_length: int | None = option_of(stages.DataSettings, "max_length")
    on_long: OnLong | None = option_of(stages.DataSettings, "on_long")
    max_completion_length: int | None = option(
        "Maximum tokens per completion; `perl rl` leaves this much room after each prompt.", unset="{}", gt=0
    )


@dataclass(frozen=True)
class DataCheck:
    """Report which commands can use a file, and which of its rows would be dropped, are too long or are repeated.

    Example: perl data check pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct"""

    file: FileSettings = FileSettings()
    model: stages.TokenizerSettings = stages.TokenizerSettings()
    length: LengthSettings = LengthSettings()


@dataclass(frozen=True)
class ShowSettings:
    """Rows"""

    for_: Use | None = option("Read the data as this stage does.", unset="the first of reward, sft, rl that can")
    rows: int = option("Number of rows to show.", default=3, gt=0)


@dataclass(frozen=True)
class DataShow:
    """Print the first rows as the model sees them, with special tokens, and with the trained tokens marked.

    Example: perl data show pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --rows 2 --for reward"""

    file: FileSettings = FileSettings()
    show: ShowSettings = ShowSettings()
    model: stages.TokenizerSettings = stages.TokenizerSettings()
    length: LengthSettings = LengthSettings()


@dataclass(frozen=True)
class ConvertSettings:
    """Rows"""

    for_: Use | None = option_of(ShowSettings, "for_")
    text: bool = flag("Write plain text instead of messages, if the format allows both (Anthropic HH, Taskmaster).")


@dataclass(frozen=True)
class ConvertRunSettings:
    """Run"""

    output: str | None = place("JSONL file to write.", short="-o", unset="FILE-trl.jsonl in the current folder")
    overwrite: bool = flag("Replace an existing file.")


@dataclass(frozen=True)
class DataConvert:
    """Convert data of any known format to JSONL in TRL's format.

    Example: perl data convert hh.jsonl --output pairs.jsonl"""

    file: FileSettings = FileSettings()
    convert: ConvertSettings = ConvertSettings()
    run: ConvertRunSettings = ConvertRunSettings()


@dataclass(frozen=True)
class ListSettings:
    """Runs"""

    dir: str | None = place(
        "Folder to search for runs, at any depth, or the folder of one run. Without DIR: `runs` in the current folder.",
        argument=True,
        unset="runs",
    )
    watch: bool | None = option(
        "Print the table again every two seconds, until Ctrl-C.", unset="on a terminal, until no run is active"
    )
    json: bool = flag("Print JSON instead of a table.")


@dataclass(frozen=True)
class Runs:
    """List the runs in a folder: stage, status, steps, model, key figure, age and size, with live progress.

    Example: perl runs"""

    runs: ListSettings = ListSettings()


@dataclass(frozen=True)
class ServeSettings:
    """Server"""

    model: str | None = place(
        "Policy to serve: folder of an sft or rl run, folder of a model or Hub id.",
        argument=True,
        unset="the embedded coffee base",
    )
    host: str = option("Address to listen at; 0.0.0.0 lets other machines in.", default="127.0.0.1", metavar="HOST")
    port: int = option("Port to listen at.", default=8000, gt=0, le=65535)
    dtype: Dtype = option("Precision of the base.", default="auto")
    max_model_len: int | None = option("Longest prompt and completion, in tokens.", unset="what the base reads", gt=0)
    max_lora_rank: int | None = option("Highest rank of an adapter.", unset="that of the run, at least 16", gt=0)
    run: bool = flag("Start the server instead of printing the command; needs vllm.")


@dataclass(frozen=True)
class Serve:
    """Print the command of a vLLM server that holds a run's base, its policy and its anchor; --run starts it.

    Example: perl serve runs/sft"""

    serve: ServeSettings = ServeSettings()


@dataclass(frozen=True)
class RunsSettings:
    """Runs"""

    run: tuple[str, ...] = place(
        "Folders of runs to compare, of any stage; a folder that contains runs; or the folder of one comparison.",
        default=(),
        argument=True,
    )


@dataclass(frozen=True)
class ReportRunSettings:
    """Run"""

    output: str | None = place(
        "Folder for the report as Markdown, JSON, CSV, plots and one HTML page.",
        short="-o",
        unset="only print the table; for a comparison, its own folder",
    )


@dataclass(frozen=True)
class Report:
    """Compare finished runs of any stage side by side: cost, quality, and the ratios to full tuning.

    Example: perl report runs/reward-full runs/reward --output runs/report"""

    runs: RunsSettings = RunsSettings()
    run: ReportRunSettings = ReportRunSettings()


@dataclass(frozen=True)
class EstimateModelSettings:
    """Model"""

    model: str | None = place(
        "Model or adapter: Hub id or local folder. Only its config is read.",
        short="-m",
        unset="the embedded coffee base",
    )
    dtype: Dtype = option_of(stages.ModelSettings, "dtype")
    trust_remote_code: bool = option_of(stages.ModelSettings, "trust_remote_code")


@dataclass(frozen=True)
class EstimateSettings:
    """Estimate"""

    stage: Compared = option("What to estimate.", default="all", argument=True)
    arms: str = option(
        "Training methods, comma-separated: full, or lora or dora, each also with -8bit or -4bit.",
        default="full,lora,lora-8bit,lora-4bit",
    )
    lora_r: str | None = option("Ranks of the adapters, comma-separated.", unset="{}")
    lora_target_modules: str | None = option_of(stages.LoraSettings, "lora_target_modules")
    gpu: str | None = option(
        "GPU memory to fit into: 24, 24GB or 24GiB (a GPU sold as 24 GB has 24 GiB).", unset="the GPU of this machine"
    )
    json: bool = flag("Print JSON, with sizes in bytes, instead of tables.")


@dataclass(frozen=True)
class EstimateTrainSettings:
    """Training"""

    per_device_train_batch_size: int | None = option_of(stages.TrainSettings, "per_device_train_batch_size")
    gradient_accumulation_steps: int | None = option_of(stages.TrainSettings, "gradient_accumulation_steps")
    max_length: int | None = option("Tokens in each row, prompt and completion together.", unset="{}", gt=0)
    gradient_checkpointing: Checkpointing | None = option_of(stages.TrainSettings, "gradient_checkpointing")
    optim: str | None = option_of(stages.TrainSettings, "optim")


@dataclass(frozen=True)
class EstimateRlSettings:
    """Sampling and reward"""

    algorithm: Algorithm = option_of(sampling.RlSettings, "algorithm")
    num_generations: int | None = option_of(sampling.RlSettings, "num_generations")
    max_completion_length: int | None = option_of(sampling.SamplingSettings, "max_completion_length")
    shared_prompts: bool = option_of(sampling.SharingSettings, "shared_prompts")
    rewards: int = option("Number of reward models, each an adapter on the same base.", default=1, gt=0)


@dataclass(frozen=True)
class Estimate:
    """Predict the memory that training needs from a model's config: which arms fit, and with which batch size.

    Example: perl estimate rl --model HuggingFaceTB/SmolLM2-135M-Instruct --gpu 24GB"""

    estimate: EstimateSettings = EstimateSettings()
    model: EstimateModelSettings = EstimateModelSettings()
    train: EstimateTrainSettings = EstimateTrainSettings()
    rl: EstimateRlSettings = EstimateRlSettings()


@dataclass(frozen=True)
class DoctorSettings:
    """Doctor"""

    json: bool = flag("Print JSON instead of text.")


@dataclass(frozen=True)
class Doctor:
    """Check this machine: versions, GPU, disk, what to install, and each precision by a forward and backward pass.

    Example: perl doctor"""

    doctor: DoctorSettings = DoctorSettings()


Stage = stages.Training | stages.Eval | Merge | Quickstart | CompareFull
OfData = DataCheck | DataShow | DataConvert
Settings = Stage | OfData | Report | Estimate | Runs | Doctor | Serve
COMMANDS: dict[str, type[Any]] = {
    "sft": stages.Sft,
    "reward": stages.Reward,
    "rl": stages.Rl,
    "eval": stages.Eval,
    "merge": Merge,
    "quickstart": Quickstart,
    "compare-full": CompareFull,
}
DATA_COMMANDS: dict[str, type[Any]] = {"data check": DataCheck, "data show": DataShow, "data convert": DataConvert}
# Commands that do not create a run.
RUNLESS_COMMANDS: dict[str, type[Any]] = {
    "runs": Runs,
    "report": Report,
    "estimate": Estimate,
    "doctor": Doctor,
    "serve": Serve,
}
ALL_COMMANDS = COMMANDS | RUNLESS_COMMANDS | DATA_COMMANDS


def command_of(settings: Settings | type[Any]) -> str:
    """The command that these settings belong to, from the object or its class."""
    kind = settings if isinstance(settings, type) else type(settings)
    return next(name for name, stage in ALL_COMMANDS.items() if stage is kind)
