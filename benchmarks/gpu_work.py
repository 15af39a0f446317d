"""What the jobs of gpu_proof.py do, each in a process of its own: they return figures, and checks that hold or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from gpu_jobs import FAILED, FINISHED, NO_GPU, NO_MEMORY

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Values = dict[str, Any]
EXTENSIONS = ("*.safetensors", "*.pt", "*.bin")
FEW = ("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 1, "--num-generations", 4)  # rows of a step
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def import_all() -> None:
    """Imports what takes long and doesn't use the GPU, while the job before this one is still running."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl.scripts.rloo  # noqa: F401

    import perlcli.commands.reward
    import perlcli.commands.rl  # noqa: F401


def result_of(job: Values) -> Values:
    """The outcome of a job, and its figures. Whatever goes wrong is an outcome too."""
    import one_base

    try:
        return {"outcome": FINISHED, **KINDS[job["kind"]](job)}
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"[:600]
        if one_base.is_out_of_memory(error):
            return {"outcome": NO_MEMORY, "error": text, "peak_mb": peak_mb()}
        return {"outcome": FAILED, "error": text, "log": traceback.format_exc()[-3000:]}


def peak_mb() -> float | None:
    """The most that torch has allocated on the GPU since the last reset."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None


def on_gpu(job: Values) -> bool:
    """Whether the job is for a GPU."""
    return bool(job["device"] == "cuda")


def place_of(job: Values) -> Path:
    """The folder of the model that the job uses."""
    return Path(job["work"]) / str(job["folder"])


def perl(*words: object, output: Path) -> Values:
    """Runs a perl command in this process, and returns the run's record. Raises as `one_base.perl` does."""
    import one_base

    shutil.rmtree(output, ignore_errors=True)
    one_base.perl([str(word) for word in (*words, "--output", output)], output)
    return dict(json.loads((output / "record.json").read_text(encoding="utf-8")))


def rows_of(run: Path) -> list[Values]:
    """A run's metrics, step by step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def drop_weights(run: Path) -> None:
    """Removes a run's weights, which would fill the memory that /dev/shm is."""
    for pattern in EXTENSIONS:
        for path in run.rglob(pattern):
            path.unlink()


# The machine


def machine(job: Values) -> Values:
    """The GPU, the driver and the versions; what the estimator and the compiled kernels rely on. Fails where a command
    can't start, such as without a package that one of its libraries imports late."""
    import measured
    import torch

    from perlcli import device
    from perlcli.cli.app import app
    from perlcli.run import record

    if app(["recipes"], standalone_mode=False):
        raise SystemExit("perl recipes failed")
    versions = record.package_versions() | ({"driver": device.driver()} if on_gpu(job) else {})
    found: Values = {"device": measured.device_name(job["device"]), "versions": versions}
    if not on_gpu(job):
        return found
    found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    found["memory_mb"] = torch.cuda.get_device_properties(0).total_memory / 1e6
    factor = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    alone = torch.cuda.memory_allocated()
    factor @ factor
    found["workspace_mb"] = (torch.cuda.memory_allocated() - alone) / 1e6
    seconds = best_of(lambda: factor @ factor, repeats=10, gpu=True)
    found["tflops"] = 2 * 8192**3 / seconds / 1e12
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found["checks"] = {"a C compiler and Python.h for Triton": bool(compiler) and header.exists()}
    return found


def best_of(action: Callable[[], object], *, repeats: int, gpu: bool) -> float:
    """The seconds of the fastest repeat."""
    import torch

    times = []
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def tests(job: Values) -> Values:
    """The tests that are marked `gpu`, by pytest without the plugins of this machine: its warnings would be errors."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    words = ["-q", "-rfE", "--tb=short", "-m", "gpu", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *(str(path.relative_to(ROOT)) for path in marked)],
        cwd=ROOT, env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-20_000:], done.stderr[-2000:], flush=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"checks": {"tests marked gpu": done.returncode == 0}, "notes": [*failed[:10], *lines[-1:]]}


# What the figures come from


def spec_of(job: Values) -> Values:
    """The job as one_base.py takes it."""
    place = place_of(job)
    names = ("batch", "generations", "tokens", "prompt_tokens", "steps", "rank")
    return {
        **{name: job[name] for name in names}, "work": str(place), "config": job["shape"], "model": None,
        "precision": job.get("precision", "bfloat16"), "device": job["device"], "checkpointing": True,
        "stage": "rl", "arm": job.get("arm", ""), "run": str(place / job["name"]),
    }  # fmt: skip


def inputs(job: Values) -> Values:
    """Writes a model of this shape, four reward adapters, prompts and pairs of one length."""
    import one_base
    import shapes

    spec = spec_of(job)
    place = place_of(job)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    made = one_base.make_inputs(spec)
    shapes.make_rows(place / "model", place / "rows", job["length"], job["length"] // 4, 8 * 16)
    (place / "made.json").write_text(json.dumps(made), encoding="utf-8")
    return {"base_mb": made["base_mb"]}


def made_of(job: Values) -> Values:
    """What `inputs` returned."""
    return dict(json.loads((place_of(job) / "made.json").read_text(encoding="utf-8")))


def rl(job: Values) -> Values:
    """`perl rl`, or what trl does, on the same work."""
    import one_base

    spec = spec_of(job) | {"targets": made_of(job)["targets"]}
    shutil.rmtree(spec["run"], ignore_errors=True)
    try:
        found = asdict(one_base.run_arm(spec))
    finally:
        drop_weights(Path(spec["run"]))
    names = ("outcome", "loading_mb", "training_mb", "ending_mb", "peak_mb", "reserved_mb", "copies", *one_base.SAME)
    result = {name: found[name] for name in names}
    if found["wall"]:
        result["step_s"] = median(found["wall"][one_base.WARM_UP :])
    path = Path(spec["run"]) / "record.json"
    if found["outcome"] != FINISHED or not path.exists():
        return result
    record = json.loads(path.read_text(encoding="utf-8"))
    result["phases"] = {name: value for name, value in record["metrics"].items() if name.startswith("seconds_")}
    result["own"] = {"loading_mb": record["memory"].get("loading_mb")}  # one_base.py resets the peak of training
    kl, copies = record["guards"].get("kl_at_start"), record["memory"].get("base_copies")
    result["notes"] = [f"KL {kl:.3g} at the start"] if kl else []
    return result | {"checks": {"KL is 0 at the start": kl == 0, "one copy of the base": copies == 1}}


def reward(job: Values) -> Values:
    """`perl reward` on pairs of one length."""
    import command_lines
    import one_base

    from perlcli import settings
    from perlcli.arms import Arm

    place = place_of(job)
    run = place / job["name"]
    peak = one_base.Peak(job["device"])
    flags = [f"--{settings.dashed(name)}" for name in Arm(job["arm"]).options]
    sizes = ("--max-steps", job["steps"], "--per-device-train-batch-size", job["batch"], "--max-length", job["length"])
    words = [*flags, "--gradient-checkpointing", command_lines.flag(job["checkpointing"]), *job["words"], *sizes]
    try:
        record = perl(
            "reward", "--model", place / "model", "--data", place / "rows" / "pairs.jsonl", "--dtype", "bfloat16",
            "--gradient-accumulation-steps", 1, *words, output=run,
        )  # fmt: skip
    finally:
        drop_weights(run)
    times = [row["seconds/step"] for row in rows_of(run)[one_base.WARM_UP :]]
    shift = record["metrics"].get("reload_shift")
    return {
        **memory_of(record, peak), "step_s": median(times), "reload_shift": shift,
        "checks": {"the saved reward model gives the same scores": shift == 0},
    }  # fmt: skip


def memory_of(record: Values, peak: Any) -> Values:
    """The peaks of a run in MB."""
    memory = record["memory"]
    before = 0.0 if peak.on_gpu else memory["before_mb"]
    return {
        "loading_mb": memory["loading_mb"], "training_mb": memory["training_mb"],
        "reserved_mb": memory.get("reserved_mb"),
        "peak_mb": peak.overall() / 1e6 - before,
    }  # fmt: skip


def sampling(job: Values) -> Values:
    """Tokens per second of some ways to sample."""
    import gpu_sampling

    return gpu_sampling.measure(place_of(job) / "model", job)


# What must be right


def roles(job: Values) -> Values:
    """Reward model and RL on the embedded base in each precision: scores, KL at the start, what changed and what did
    not, and which roles get gradients."""
    import gpu_roles

    return gpu_roles.check(Path(job["work"]) / "roles", gpu=on_gpu(job))


def resume(job: Values) -> Values:
    """Four steps of RL at once, and two and two: the same adapter, and the same figures of steps 3 and 4."""
    import torch
    from safetensors.torch import load_file

    place = Path(job["work"]) / "resume"
    common = ("rl", "--dtype", "bfloat16", "--reward", "perlcli.coffee:reward", "--save-steps", 2)
    common = (*common, "--set", "lr_scheduler_type=constant", *FEW, "--max-completion-length", 16, "--max-steps")
    perl(*common, 4, output=place / "at-once")
    perl(*common, 2, output=place / "in-parts")
    import one_base

    words = [*map(str, common), "4", "--resume", "--output", str(place / "in-parts")]
    one_base.perl(words, place / "in-parts")
    rows = [rows_of(place / name)[2:] for name in ("at-once", "in-parts")]
    keys = ("reward", "loss", "kl")
    difference = max(abs(one[key] - other[key]) for one, other in zip(*rows, strict=True) for key in keys)
    one, other = (load_file(place / name / "adapter_model.safetensors") for name in ("at-once", "in-parts"))
    weights = max(float((one[name] - other[name]).abs().max()) for name in one)
    equal = all(torch.equal(one[name], other[name]) for name in one)
    return {
        "checks": {"a resumed run ends with the same adapter": equal},
        "notes": [f"largest difference: {difference:.3g} in reward, loss and KL, {weights:.3g} in the adapter"],
    }


def precisions(job: Values) -> Values:
    """The comparison with float32 that `perl doctor` makes."""
    from perlcli.doctor import precisions as doctor

    names = [name for name in doctor.PRECISIONS if name != "float16" or on_gpu(job)]
    found = {name: doctor.compare(name) for name in names}
    notes = [f"{name}: loss {one.loss:.4f}, cosine {one.cosine:.5f}" for name, one in found.items()]
    return {"checks": {f"{name} is right": one.is_right for name, one in found.items()}, "notes": notes}


LIMITED = (
    "import sys, torch; torch.cuda.set_per_process_memory_fraction(float(sys.argv[1])); "
    "sys.argv = ['perl', *sys.argv[2:]]; from perlcli.cli.app import main; main()"
)


def no_room(job: Values) -> Values:
    """A GPU that is too small, by a limit on what torch may allocate: each place must say so, and say what to do."""
    if not on_gpu(job):
        return {"outcome": NO_GPU}
    import torch

    place, total = place_of(job), torch.cuda.get_device_properties(0).total_memory
    base = made_of(job)["base_mb"] * 1e6
    common: tuple[object, ...] = ("--model", place / "model", "--dtype", "bfloat16", "--max-steps", 1)
    pairs = (*common, "--data", place / "rows" / "pairs.jsonl", "--max-length", job["length"])
    prompts = (*common, "--data", place / "prompts", "--reward", place / "reward-0", "--num-generations", 64)
    places: dict[str, tuple[float, tuple[object, ...]]] = {
        "loading": (0.4, ("reward", *pairs)),
        "loading in 4 bits": (0.3, ("reward", *pairs, "--load-in-4bit")),
        "loading for full tuning": (1.2, ("reward", *pairs, "--full")),
        "learning": (1.8, ("reward", *pairs, "--per-device-train-batch-size", 64)),
        "sampling": (1.8, ("rl", *prompts, "--per-device-train-batch-size", 4096, "--max-completion-length", 64)),
    }
    started = {}
    for name, (share, words) in places.items():
        command = [str(word) for word in (*words, "--output", place / f"no-room-{len(started)}", "--overwrite")]
        command = [sys.executable, "-c", LIMITED, str(min(1.0, share * base / total)), *command]
        started[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checks, notes = {}, []
    for name, process in started.items():
        said = process.communicate()[1].strip().splitlines()[-2:]
        text = " ".join(said)
        checks[f"no room while {name} is reported"] = (
            process.returncode == 1 and "out of memory" in text.lower() and "Hint: " in text
        )
        notes.append(f"{name}: exit code {process.returncode}: {text[:300]}")
    return {"checks": checks, "notes": notes}


KINDS: dict[str, Callable[[Values], Values]] = {
    each.__name__: each for each in (machine, tests, inputs, rl, reward, sampling, roles, resume, precisions, no_room)
}


def work() -> None:
    """Imports, then does the jobs that arrive as lines of JSON on standard input, and writes each one's result to the
    path that the job names. A job that is to be forked runs in a copy of this process, which waits for the next one;
    any other ends it."""
    from perlcli import upstream

    os.environ |= QUIET
    upstream.hush()  # as the command does: some jobs load models without it
    import_all()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork() if job["forked"] else 0
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            say(f"exit code {code}")
            continue
        Path(job["answer"]).write_text(json.dumps(result_of(job), default=str), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        if not job["forked"]:
            say("exit code 0")  # a process that the job has left behind could keep the pipe open
        os._exit(0)  # nothing to tidy up: the next job waits


def say(word: str) -> None:
    """Tells the parent, on the pipe that it waits at."""
    os.write(int(os.environ["GPU_PROOF_PIPE"]), f"{word}\n".encode())


if __name__ == "__main__":
    work()
