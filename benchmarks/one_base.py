"""The cost of `perl rl`, stock `trl rloo` and full RLHF, or of `perl reward` and `trl reward`: peak memory and time
per step, on a CPU or CUDA.

    python benchmarks/one_base.py --model FOLDER --precision float32
    python benchmarks/one_base.py --config llama-3.2-1b --precision bfloat16 --batch 16 --tokens 128
    python benchmarks/one_base.py --model FOLDER --pairs hh.jsonl --arms perl,perl-unshared,stock

Every arm is a fresh process, so that no peak leaks into the next; arms take turns over the repeats. README.md in this
folder says what is measured, and how.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import measured
import shapes
from command_lines import REWARD, RL, perl_words, stock_words

HERE = Path(__file__).resolve().parent
MB = 1e6
WARM_UP = 2  # steps before the clock counts: caches fill, CUDA picks its kernels
LOSSES = 1e-3  # how far the losses of reward models may differ, relative to each other: by rounding
MEMORY, TIME = "memory", "time"  # what a process measures: one of them on a CPU, both on a GPU
# glibc keeps most of what is freed, and equal processes can differ by some hundred MB. With these variables it gives
# blocks from 128 kB back at once: resident memory is what is held, to within a MB, and a step takes a third longer.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
CLOCKS = ("wall", "cpu")
MEMORY_KEYS = (
    "baseline_mb", "loading_mb", "training_mb", "ending_mb", "peak_mb", "reserved_mb", "weights_mb", "copies",
)  # fmt: skip
COMPARED = (
    ("perl", "stock"), ("perl", "stock-4bit-reward"), ("perl", "stock-float32"), ("perl", "full"), ("stock", "full"),
    ("perl", "perl-unshared"), ("perl-merged", "perl"), ("perl-4-rewards", "perl"),
)  # fmt: skip
SAME = ("mean_length", "min_length", "max_length", "step_tokens")  # what must be equal in every arm

ARMS = {
    "perl": "perl rl: policy, anchor and reward model on one base",
    "perl-unshared": "perl rl --no-shared-prompts: each completion computes its prompt again",
    "perl-merged": "perl rl --rollouts merged: sampling with merged copies of the adapted projections",
    "perl-4-rewards": "perl rl with four reward adapters on the one base",
    "stock": "trl rloo --use_peft, the reward adapter on a second base, in the same dtype (with 4bit: bfloat16)",
    "stock-4bit-reward": "stock with both bases in 4 bits, by --model_init_kwargs; --load_in_4bit quantises only one",
    "stock-float32": "stock without a choice of precision: float32 weights, bfloat16 autocast",
    "full": "trl rloo without adapters: full policy, full anchor, full reward model (with 4bit: bfloat16)",
}


OF_REWARD = ("perl", "perl-unshared", "stock", "stock-float32", "full")  # arms that --pairs has


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a model with its tokenizer")
    what.add_argument("--config", choices=shapes.CONFIGS, help="random weights in the shape of this model")
    add("--pairs", help="pairs in any format of `perl data`, for the cost of a reward model instead of RL")
    add("--length", type=int, default=512, help="with --pairs, the longest row in tokens; longer ones are left out")
    add("--arms", help="arms to run: " + ", ".join(ARMS), default="perl,stock,full,perl-4-rewards")
    add("--precision", choices=["float32", "bfloat16", "4bit"], default="float32", help="precision of the weights")
    add("--steps", type=int, default=6, help=f"optimiser steps; the first {WARM_UP} don't count")
    add("--repeats", type=int, default=2, help="timed processes per arm; on a CPU one more measures its memory")
    add("--batch", type=int, default=8, help="completions per step")
    add("--generations", type=int, default=4, help="completions per prompt")
    add("--tokens", type=int, default=32, help="tokens per completion")
    add("--prompt-tokens", type=int, default=32, help="tokens per prompt")
    add("--rank", type=int, default=16, help="LoRA rank of policy and reward model")
    add("--device", choices=["cpu", "cuda"], help="device (default: cuda if available)")
    add("--checkpointing", choices=["on", "off"], help="gradient checkpointing (default: on for cuda, as in perl rl)")
    add("--output", help="output path without extension (default: results/DEVICE-MODEL-PRECISION in this folder)")
    add("--work", help="folder for the model and the runs (default: a temporary one)")
    found = parser.parse_args(words)
    found.arms = found.arms.split(",")
    unknown = [arm for arm in found.arms if arm not in ARMS]
    if unknown:
        parser.error(f"--arms must be one or more of {', '.join(ARMS)}, not {', '.join(unknown)}")
    if found.pairs and not set(found.arms) <= set(OF_REWARD):
        parser.error(f"--pairs: --arms must be one or more of {', '.join(OF_REWARD)}")
    if found.batch % found.generations and not found.pairs:
        parser.error("--batch must be a multiple of --generations")
    if found.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, the number of warm-up steps, not {found.steps}")
    return found


# The inputs, made once in a separate process: the model, reward adapters on it, prompts.


def make_inputs(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes the model, four reward adapters and the prompts into the work folder; returns what was made."""
    work = Path(spec["work"])
    make_model(spec, work / "model")
    targets, second, first = make_rewards(spec, work)
    make_pairs(spec, work) if spec["stage"] == REWARD else make_prompts(spec, work)
    size = 4 if spec["precision"] == "float32" else 2
    return {"targets": targets, "base_mb": first * size / MB, "second_base_mb": second * size / MB}


def make_model(spec: dict[str, Any], folder: Path) -> None:
    """The base, stored on a CPU in another dtype than it is loaded in.

    Weights of the requested dtype stay mapped from the file and are shared between loads, so the cost of a copy would
    depend on the file. Converted weights take memory for every copy.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = "bfloat16" if spec["precision"] == "float32" or spec["device"] == "cuda" else "float32"
    if not spec["model"]:
        shapes.make_model(spec["config"], folder, stored, spec["device"])
        return
    AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, stored)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(spec["model"]).save_pretrained(folder)


def make_rewards(spec: dict[str, Any], work: Path) -> tuple[list[str], int, int]:
    """Writes random reward adapters as peft saves them.

    Returns the adapted modules, and the number of parameters of a reward model's base and of the policy's.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    from perlcli.model import sources, target_modules

    source = sources.locate(str(work / "model"))
    skeleton = sources.skeleton(source)
    assert skeleton is not None
    first = sum(parameter.numel() for parameter in skeleton.parameters())
    targets = target_modules.target_modules(skeleton, "attention")
    source.config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(source.config)
        second = sum(p.numel() for name, p in model.named_parameters() if "score" not in name)
        lora = LoraConfig(
            r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules=list(targets), task_type="SEQ_CLS",
            base_model_name_or_path=source.base, inference_mode=True,
        )  # fmt: skip
        shapes = {name: value.shape for name, value in get_peft_model_state_dict(get_peft_model(model, lora)).items()}
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        folder = work / f"reward-{number}"
        lora.save_pretrained(folder)
        weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return list(targets), second, first


def make_pairs(spec: dict[str, Any], work: Path) -> None:
    """Writes pairs that fit, in trl's format, as many as the steps take."""
    from transformers import AutoTokenizer

    from perlcli.cli.app import app

    place = work / "pairs" / "train.jsonl"
    assert not app(["data", "convert", spec["pairs"], "--output", str(work / "all.jsonl")], standalone_mode=False)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    rows = [json.loads(line) for line in (work / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [[[*row["prompt"], *row[name]] for name in ("chosen", "rejected")] for row in rows]
    longest = [max(len(tokenizer.apply_chat_template(each)["input_ids"]) for each in both) for both in answers]
    fit = [row for row, tokens in zip(rows, longest, strict=True) if tokens <= spec["length"]]
    place.parent.mkdir(exist_ok=True)
    kept = fit[: spec["steps"] * spec["batch"]]
    place.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def make_prompts(spec: dict[str, Any], work: Path) -> None:
    """Writes prompts of one length, a new one for each place of each step."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    dice = random.Random(0)
    words = shapes.words_of(tokenizer, dice)
    (work / "prompts").mkdir(exist_ok=True)
    with (work / "prompts" / "train.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(spec["steps"] * spec["batch"] // spec["generations"]):
            prompt = "".join(f" {dice.choice(words)}" for _ in range(spec["prompt_tokens"]))
            assert len(tokenizer(prompt)["input_ids"]) == spec["prompt_tokens"]
            file.write(json.dumps({"prompt": prompt}) + "\n")


# One arm, in a separate process.


class Peak:
    """Peak memory in bytes, since the last reset and overall; resets by other code (perl rl has one) lose nothing."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.highest = self.reserved = 0
        if self.on_gpu:
            import torch

            self._reset = torch.cuda.reset_peak_memory_stats
            torch.cuda.reset_peak_memory_stats = self.reset

    def now(self) -> int:
        """The peak since the last reset."""
        if not self.on_gpu:
            return status_bytes("VmHWM")
        import torch

        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        return torch.cuda.max_memory_allocated()

    def overall(self) -> int:
        """The peak of the entire process."""
        self.highest = max(self.highest, self.now())
        return self.highest

    def reset(self, *_: Any) -> None:
        """Starts a new peak at what is held now."""
        self.overall()  # keeps the highest so far
        if self.on_gpu:
            self._reset()
        else:
            Path("/proc/self/clear_refs").write_text("5")


def status_bytes(name: str) -> int:
    """A value in bytes that the kernel reports for this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"no {name} in /proc/self/status: on a CPU this needs Linux"
    return int(found[1]) * 1024


@dataclass
class Figures:
    """What an arm's process measured; memory in MB."""

    arm: str
    outcome: str = "failed"  # finished, out of memory or failed
    baseline_mb: float = 0.0  # on a CPU: resident after imports, before anything is loaded
    loading_mb: float = 0.0  # peaks, minus the baseline
    training_mb: float = 0.0
    ending_mb: float = 0.0  # after the last step: checks, saving
    peak_mb: float = 0.0
    reserved_mb: float = 0.0
    weights_mb: float = 0.0  # weights of bases that are alive at the end of training, each storage once
    copies: float = 0.0  # the same as a multiple of the policy's own
    wall: tuple[float, ...] = ()  # seconds of each step
    cpu: tuple[float, ...] = ()
    mean_length: float = 0.0
    min_length: float = 0.0
    max_length: float = 0.0
    step_tokens: float = 0.0  # of prompts and completions
    loss: float = 0.0  # of the last step


def run_arm(spec: dict[str, Any]) -> Figures:
    """Runs one arm in this process, and measures it."""
    import_all(spec)
    figures = Figures(spec["arm"])
    peak = Peak(spec["device"])
    figures.baseline_mb = 0.0 if peak.on_gpu else status_bytes("VmRSS") / MB
    try:
        with watching(figures, peak, spec):
            start_arm(spec)
        figures.outcome = "finished"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        figures.outcome = "out of memory"
    figures.ending_mb = peak.now() / MB - figures.baseline_mb
    figures.peak_mb = peak.overall() / MB - figures.baseline_mb
    figures.reserved_mb = peak.reserved / MB
    return figures


def import_all(spec: dict[str, Any]) -> None:
    """Imports what the arms need, the same in each, so that it is in the baseline."""
    import peft  # noqa: F401
    import trl.scripts.reward
    import trl.scripts.rloo
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RewardTrainer, RLOOTrainer  # noqa: F401

    import perlcli.commands.reward
    import perlcli.commands.rl  # noqa: F401

    config = AutoConfig.from_pretrained(Path(spec["work"]) / "model")
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        kind._model_mapping[type(config)]  # imports the module that holds the model
    if spec["precision"] == "4bit":
        import bitsandbytes  # noqa: F401
    trl.scripts.rloo.make_parser()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a GPU or on the host."""
    return (
        type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "allocate memory" in str(error)
    )


def start_arm(spec: dict[str, Any]) -> None:
    """Calls the arm's entry point, as its command line would."""
    arm = spec["arm"]
    if arm.startswith("perl"):
        perl(perl_words(spec, 4 if arm == "perl-4-rewards" else 1), Path(spec["run"]))
        return
    if spec["stage"] == REWARD:
        from trl.scripts.reward import main, make_parser
    else:
        from trl.scripts.rloo import main, make_parser

    main(*make_parser().parse_args_and_config(stock_words(spec, arm), fail_with_unknown_args=False))


def perl(words: list[str], run: Path) -> None:
    """Runs a perl command in this process. Raises MemoryError if its record says that memory ran out, SystemExit for
    any other failure."""
    from perlcli.cli.app import app

    code = app([*words, "--debug"], standalone_mode=False)
    if code:
        record = run / "record.json"
        failure = json.loads(record.read_text(encoding="utf-8"))["failure"] if record.exists() else None
        if failure and "out of memory" in failure:
            raise MemoryError(failure)
        raise SystemExit(f"perl {words[0]} failed with exit code {code}: {failure or 'it left no record'}")


@contextlib.contextmanager
def watching(figures: Figures, peak: Peak, spec: dict[str, Any]) -> Iterator[None]:
    """Adds a clock to the trainer that is created inside the block; the arms don't need to know about it."""
    from transformers import Trainer, TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self, trainer: Trainer) -> None:
            self.trainer = trainer
            self.marks: list[tuple[float, float]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            figures.loading_mb = peak.overall() / MB - figures.baseline_mb
            peak.reset()
            self.mark()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark()
            if state.global_step == state.max_steps:
                figures.training_mb = peak.now() / MB - figures.baseline_mb
                figures.wall, figures.cpu = (steps(column) for column in zip(*self.marks, strict=True))
                peak.reset()
                figures.weights_mb, figures.copies = count_bases(self.trainer.model, spec["rank"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for name in ("mean_length", "min_length", "max_length"):
                if f"completions/{name}" in logs:
                    setattr(figures, name, logs[f"completions/{name}"])
            figures.loss = logs.get("loss", figures.loss)
            if "num_tokens" in logs:
                figures.step_tokens = logs["num_tokens"] / state.global_step

        def mark(self) -> None:
            if peak.on_gpu:
                import torch

                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))

    original = Trainer.__init__

    def with_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Clock(self))

    Trainer.__init__ = with_clock
    try:
        yield
    finally:
        Trainer.__init__ = original


def steps(marks: tuple[float, ...]) -> tuple[float, ...]:
    """The seconds between marks."""
    return tuple(later - earlier for earlier, later in pairwise(marks))


def count_bases(policy: Any, rank: int) -> tuple[float, float]:
    """The weights of all bases alive in this process in MB, and the same as a multiple of the policy's own."""
    import torch

    def of_base(parameters: Any) -> int:
        found = [p for p in parameters if hasattr(p, "quant_state") or (p.ndim == 2 and min(p.shape) > rank)]
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in found}.values())

    alive = [item for item in gc.get_objects() if issubclass(type(item), torch.nn.Parameter)]
    total, own = of_base(alive), of_base(policy.parameters())
    return total / MB, total / own


# The parent: arms in turn, then the figures.


def measure(given: argparse.Namespace, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs every arm for memory and `repeats` times for time, in turn; one that ran out of memory runs once."""
    found: list[dict[str, Any]] = []
    on_gpu = spec["device"] == "cuda"
    for repeat in range(given.repeats if on_gpu else given.repeats + 1):
        kinds = [MEMORY, TIME] if on_gpu else [TIME if repeat else MEMORY]
        for arm in spec["arms"] if repeat % 2 == 0 else spec["arms"][::-1]:
            if any(one["arm"] == arm and one["outcome"] != "finished" for one in found):
                continue
            run = str(Path(spec["work"]) / f"run-{arm}-{repeat}")
            count = spec["steps"] if TIME in kinds else WARM_UP + 1
            one = in_process({**spec, "arm": arm, "run": run, "steps": count}, GIVE_BACK if kinds == [MEMORY] else {})
            found.append(one | {"repeat": repeat, "kinds": kinds})
            figures = []
            if MEMORY in kinds:
                figures.append(f"peak {one['peak_mb']:,.0f} MB")
            if TIME in kinds and one["wall"]:
                figures.append(f"step {step(one, 'wall'):.3f} s, CPU {step(one, 'cpu'):.3f} s")
            print(f"{arm}: {', '.join(figures)}, {one['outcome']}", flush=True)
    return found


def in_process(spec: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a fresh process of this script measures; its output is only shown if it fails."""
    work = Path(spec["work"])
    place, answer, log = work / "spec.json", work / "answer.json", work / "log.txt"
    place.write_text(json.dumps(spec), encoding="utf-8")
    answer.unlink(missing_ok=True)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hub"), "TOKENIZERS_PARALLELISM": "false"}
    if spec["device"] == "cpu":
        quiet |= {"CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    with log.open("w") as file:
        command = [sys.executable, str(Path(__file__).resolve()), "in-process", str(place), str(answer)]
        code = subprocess.run(command, stdout=file, stderr=file, env=os.environ | quiet, check=False).returncode
    if answer.exists():
        return dict(json.loads(answer.read_text(encoding="utf-8")))
    if code == -9:  # how the kernel ends a process when the host has no memory left
        return asdict(Figures(spec["arm"], outcome="out of memory"))
    raise SystemExit(f"{spec.get('arm', 'the inputs')} failed with exit code {code}:\n{log.read_text()[-4000:]}")


def step(one: dict[str, Any], clock: str) -> float:
    """The median seconds of a step after the first ones."""
    return median(one[clock][WARM_UP:])


def check_equal_work(found: list[dict[str, Any]], *, is_reward: bool = False) -> None:
    """Fails if the arms didn't read and write the same number of tokens, or reward models have other losses."""
    finished = [one for one in found if one["outcome"] == "finished"]
    for name in SAME:
        values = {one["arm"]: one[name] for one in finished}
        if len(set(values.values())) > 1:
            raise SystemExit(f"The arms did different work: {name} is {values}")
    losses = {one["arm"]: one["loss"] for one in finished if one["kinds"] == [MEMORY]}  # as many steps in each
    if losses and is_reward and max(losses.values()) - min(losses.values()) > LOSSES * max(losses.values()):
        raise SystemExit(f"The arms did different work: their losses are {losses}")


def summary(found: list[dict[str, Any]], base_mb: float) -> dict[str, dict[str, Any]]:
    """For each arm the medians over the repeats, with lowest and highest, and its ratios to every other arm."""
    arms: dict[str, dict[str, Any]] = {}
    names = list(dict.fromkeys(one["arm"] for one in found))
    for arm in names:
        memory, timed = runs_of(found, arm, MEMORY), runs_of(found, arm, TIME)
        arms[arm] = {"outcome": next(one for one in reversed(found) if one["arm"] == arm)["outcome"]}
        arms[arm] |= {key: spread([one[key] for one in memory.values()]) for key in MEMORY_KEYS}
        arms[arm] |= {clock: spread([step(one, clock) for one in timed.values() if one["wall"]]) for clock in CLOCKS}
    finished = [arm for arm in names if arms[arm]["outcome"] == "finished"]
    for arm in finished:
        arms[arm] |= {f"against {other}": compared(found, arm, other, base_mb) for other in finished if other != arm}
    return arms


def runs_of(found: list[dict[str, Any]], arm: str, kind: str) -> dict[int, dict[str, Any]]:
    """An arm's processes of one kind, by repeat."""
    return {one["repeat"]: one for one in found if one["arm"] == arm and kind in one["kinds"]}


def compared(found: list[dict[str, Any]], arm: str, other: str, base_mb: float) -> dict[str, Any]:
    """Ratios of one arm to another, from the pairs in the same repeat."""
    memory, timed = ([*pairs(found, arm, other, kind)] for kind in (MEMORY, TIME))
    return {
        "peak": spread([mine["peak_mb"] / theirs["peak_mb"] for mine, theirs in memory]),
        "training": spread([mine["training_mb"] / theirs["training_mb"] for mine, theirs in memory]),
        "saved_bases": spread([(theirs["peak_mb"] - mine["peak_mb"]) / base_mb for mine, theirs in memory]),
        **{clock: spread([step(mine, clock) / step(theirs, clock) for mine, theirs in timed]) for clock in CLOCKS},
    }


def pairs(found: list[dict[str, Any]], arm: str, other: str, kind: str) -> Iterator[tuple[Any, Any]]:
    """The processes of two arms in the same repeat."""
    mine, theirs = runs_of(found, arm, kind), runs_of(found, other, kind)
    return ((one, theirs[repeat]) for repeat, one in mine.items() if repeat in theirs)


def spread(values: list[float]) -> list[float]:
    """Median, lowest and highest."""
    return [median(values), min(values), max(values)] if values else [math.nan] * 3


def table(arms: dict[str, dict[str, Any]], *, on_gpu: bool) -> str:
    """The figures as Markdown."""
    memory = ["peak_mb", "loading_mb", "training_mb", "ending_mb", *(["reserved_mb"] if on_gpu else []), "weights_mb"]
    heads = ["arm", *(f"{key[:-3]} MB" for key in memory), "bases", "step s", "step CPU s"]
    forms = {**dict.fromkeys(memory, "{:,.0f}"), "copies": "{:.2f}", "wall": "{:.3f}", "cpu": "{:.3f}"}
    rows = [
        [arm, *(shown(figures[key], form) for key, form in forms.items())]
        if figures["outcome"] == "finished"
        else [arm, f"{figures['outcome']} (at {figures['peak_mb'][0]:,.0f})", *[""] * (len(heads) - 2)]
        for arm, figures in arms.items()
    ]
    ratios = {f"{arm} / {other}": arms.get(arm, {}).get(f"against {other}") for arm, other in COMPARED}
    keys = ("peak", "training", "saved_bases", "wall", "cpu")
    against = [[name, *(shown(found[key], "{:.3f}") for key in keys)] for name, found in ratios.items() if found]
    return (
        measured.markdown(heads, rows)
        + "\n\n"
        + measured.markdown(["against", "peak", "training peak", "bases saved", "step", "step CPU"], against)
    )


def shown(values: list[float], form: str) -> str:
    """A median, with lowest and highest if they differ when shown."""
    if math.isnan(values[0]):  # not measured
        return ""
    middle, low, high = (form.format(value) for value in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def described(spec: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured on."""
    return measured.described(
        "benchmarks/one_base.py",
        spec["device"],
        threads=os.environ.get("OMP_NUM_THREADS", "default"),
        environment={name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "PYTORCH_"))},
        base_mb=round(spec["base_mb"], 1),
        second_base_mb=round(spec["second_base_mb"], 1),
    )


def write(path: Path, content: dict[str, Any], tables: str) -> None:
    """Saves the figures as JSON and as Markdown."""
    about = content["about"]
    arms = "\n".join(f"- {arm}: {ARMS[arm]}" for arm in content["arms"])
    measured.write(
        path,
        content,
        f"A base: {about['base_mb']:,.0f} MB unquantised; stock's second one, which has no output head: "
        f"{about['second_base_mb']:,.0f} MB.\n\n{tables}\n\n{arms}",
    )


def arms_to_run(given: argparse.Namespace) -> list[str]:
    """The arms that this version of perlcli can run."""
    from perlcli import settings

    arms = list(given.arms)
    if "perl-4-rewards" in arms and "reward_weights" not in {item.name for item in settings.options(settings.Rl)}:
        print("Skipping perl-4-rewards: this version of `perl rl` takes only one --reward")
        arms.remove("perl-4-rewards")
    return arms


def settled(given: argparse.Namespace, work: str) -> dict[str, Any]:
    """What every process of this benchmark gets as its specification."""
    device = given.device or in_process({"work": work, "device": "", "arm": "look"})["device"]
    names = ("config", "precision", "steps", "batch", "generations", "tokens", "prompt_tokens", "rank", "length")
    spec = {name: getattr(given, name) for name in names} | {"work": work, "device": device}
    spec["model"] = str(Path(given.model).resolve()) if given.model else None
    spec["checkpointing"] = given.checkpointing == "on" if given.checkpointing else device == "cuda"
    spec["stage"], spec["pairs"] = (REWARD, str(Path(given.pairs).resolve())) if given.pairs else (RL, None)
    spec["arms"] = arms_to_run(given)
    return spec | in_process(spec | {"arm": "inputs"})


def main() -> None:
    """Measures, shows and saves."""
    given = parse()
    with contextlib.ExitStack() as stack:
        if given.work:
            Path(given.work).mkdir(parents=True)
        work = given.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="one-base-"))
        spec = settled(given, str(Path(work).resolve()))
        found = measure(given, spec)
        check_equal_work(found, is_reward=bool(given.pairs))
        about = described(spec)
    arms = summary(found, spec["second_base_mb"])
    tables = table(arms, on_gpu=spec["device"] == "cuda")
    name = given.config or Path(given.model).name
    short = measured.short_name(spec["device"], about["device"])
    stage = "-reward" if given.pairs else ""
    path = Path(given.output) if given.output else HERE / "results" / f"{short}-{name}-{given.precision}{stage}"
    write(path, {"about": about, "arms": arms, "runs": found}, tables)
    print(f"\n{tables}\n\nWrote {path}.md and {path.name}.json")


def in_this_process(place: str, answer: str) -> None:
    """Does what the parent asked for, and writes the answer as JSON."""
    import torch

    spec = json.loads(Path(place).read_text(encoding="utf-8"))
    result: dict[str, Any]
    if spec["arm"] == "look":
        result = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    elif spec["arm"] == "inputs":
        result = make_inputs(spec)
    else:
        result = asdict(run_arm(spec))
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-process"]:
        in_this_process(*sys.argv[2:])
    else:
        main()
