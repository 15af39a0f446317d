"""Everything that needs a GPU, measured and checked by one command: within ten minutes on an H100.

    python benchmarks/gpu_proof.py --out OUT --work /dev/shm/proof --predictions benchmarks/predictions.json
    python benchmarks/gpu_proof.py --out OUT --work work --small tiny --large tiny --device cpu    # a rehearsal
    python benchmarks/gpu_proof.py --predict benchmarks/predictions.json    # beforehand, on a CPU

The jobs run in order of value, each in a process of its own. The report is written again after each job. The same
command with the same --work goes on with what failed or was left out. README.md in this folder says more.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_predictions
import gpu_tables
import measured
import shapes
from gpu_jobs import FAILED, FINISHED, FOR_GOOD, INPUTS, LARGE, MACHINE, SMALL, Job, every_job, sizes_of

from perlcli import upstream

HERE = Path(__file__).resolve().parent
SCRIPT = "benchmarks/gpu_proof.py"
SECONDS = 580.0  # that one call may take
RESERVE = 10.0  # seconds for the end: killing a job, writing the report
ENOUGH = 0.6  # a job starts if this share of the time that it is expected to take is left
PATIENCE, GRACE = 3.0, 20.0  # a job is cut off after PATIENCE times the expected seconds, plus GRACE
CUT_OFF, LEFT_OUT = "cut off", "left out"
STATE, ANSWER, LOGS = "proof.json", "answer.json", "logs.txt"
Result = dict[str, Any]
Clock = Callable[[], float]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder for the report and the logs")
    add("--work", type=Path, help="folder for models, runs and the state, best in memory, such as /dev/shm/proof")
    add("--seconds", type=float, default=SECONDS, help="seconds that this call may take (default: %(default)g)")
    add("--small", choices=shapes.CONFIGS, default="llama-3.2-1b", help="shape of the small model (%(default)s)")
    add("--large", choices=shapes.CONFIGS, default="llama-3.1-8b", help="shape of the large model (%(default)s)")
    add("--only", default="*", help="jobs to run, comma-separated, such as rl-small-*,sampling (default: all)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for rehearsals (default: %(default)s)")
    add("--predictions", type=Path, help="file that --predict has written")
    add("--predict", type=Path, metavar="FILE", help="only write the predictions of `perl estimate` to this file")
    add("--results", type=Path, default=HERE / "results", help="second folder for the report (default: results here)")
    add("--commit", default="", help="git commit for the report, where this folder isn't a git checkout")
    add(
        "--processes", choices=["fresh", "forked"],
        help="a fresh process for each job, or copies of one that has imported all (default: fresh; cpu: forked)",
    )  # fmt: skip
    found = parser.parse_args(words)
    if found.predict is None and not (found.out and found.work):
        parser.error("--out and --work are required")
    if found.seconds <= RESERVE:
        parser.error(f"--seconds must be above {RESERVE:g}, not {found.seconds:g}")
    found.processes = found.processes or ("forked" if found.device == "cpu" else "fresh")
    return found


class Worker:
    """A process that imports what the jobs need, then waits for one. A forked job leaves it ready for the next."""

    def __init__(self, log: Path, command: Sequence[str], device: str) -> None:
        self.log, (self.pipe, theirs) = log, os.pipe()
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True, pass_fds=(theirs,),
                env=os.environ | hidden | {"GPU_PROOF_PIPE": str(theirs), "HF_HOME": str(log.parent / "hub")},
            )  # fmt: skip
        os.close(theirs)

    def run(self, job: Mapping[str, Any], limit: float) -> Result:
        """The job's result, within so many seconds. Whatever happens to the process is an outcome."""
        answer, start = Path(job["answer"]), self.log.stat().st_size
        answer.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # if it has died, its pipe is closed too
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        is_over, _, _ = select.select([self.pipe], [], [], limit)
        if not is_over:
            self.end()
            return {"outcome": CUT_OFF, "error": f"after {limit:.0f} s", "log": self.tail(start)}
        said = os.read(self.pipe, 100).decode()
        try:
            return dict(json.loads(answer.read_text(encoding="utf-8"))) | {"log": self.tail(start)}
        except (OSError, ValueError):
            how = said.strip() or f"exit code {self.end()}"
            return {"outcome": FAILED, "error": f"the process ended without a result: {how}", "log": self.tail(start)}

    @property
    def is_alive(self) -> bool:
        """Whether it can do a job."""
        return self.process.poll() is None

    def end(self) -> int | None:
        """Ends the process with all that it has started; returns its exit code, None if it can't be ended in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)  # one that has answered is about to end by itself
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own process group: also what it has left behind
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may be stuck in the driver
            self.process.wait(4)
        if self.process.stdin and not self.process.stdin.closed:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            os.close(self.pipe)
        return self.process.returncode

    def tail(self, start: int) -> str:
        """The end of what was written to the log since then, or at all: it may have died before."""
        with self.log.open("rb") as file:
            text = file.read()
        return (text[start:] or text)[-3000:].decode(errors="replace")


class Workers:
    """Hands out a worker for each job. A fresh one imports while the job before is still running."""

    def __init__(self, work: Path, device: str, *, forked: bool, command: Sequence[str] = ()) -> None:
        self.work, self.device, self.forked = work, device, forked
        self.command = command or (sys.executable, "-u", str(HERE / "gpu_work.py"))
        self.count = 0
        self.ready: Worker | None = None
        self.busy: Worker | None = None

    def next(self, *, is_last: bool) -> Worker:
        """A worker for the next job."""
        if self.forked and self.busy and self.busy.is_alive:
            return self.busy
        if self.busy:
            self.busy.end()
        self.busy, self.ready = self.ready or self._new(), None
        if not (self.forked or is_last):
            self.ready = self._new()
        return self.busy

    def _new(self) -> Worker:
        self.count += 1
        return Worker(self.work / f"log-{self.count}.txt", self.command, self.device)

    def end(self) -> None:
        """Ends all of them."""
        for worker in (self.busy, self.ready):
            if worker:
                worker.end()


class Proof:
    """The results so far, kept in the work folder, and the report of them."""

    def __init__(self, given: argparse.Namespace, jobs: Sequence[Job]) -> None:
        self.given, self.jobs = given, jobs
        self.predicted = gpu_predictions.read(given.predictions)
        self.state = given.work / STATE
        kept = json.loads(self.state.read_text(encoding="utf-8")) if self.state.exists() else {}
        self.commands: list[str] = [*kept.get("commands", []), measured.command_line(SCRIPT)]
        self.results: dict[str, Result] = {}
        for job in jobs:
            one = kept.get("jobs", {}).get(job.name)
            if one and one["job"] == self.identity(job):
                self.results[job.name] = one | {"predicted": self.predicted.get(job.name)}

    def identity(self, job: Job) -> Any:
        """What must be equal for a kept result to be this job's."""
        return json.loads(json.dumps({"kind": job.kind, "values": job.values, "device": self.given.device}))

    def is_done(self, name: str) -> bool:
        """Whether a job ended in a way that no second try would change."""
        return self.results.get(name, {}).get("outcome") in FOR_GOOD

    def was_tried(self, job: Job) -> bool:
        """Whether a job has already cost its time, so that others come first; unless those others
        need it."""
        return job.kind not in (MACHINE, INPUTS) and self.results.get(job.name, {}).get("outcome", LEFT_OUT) != LEFT_OUT

    def add(self, job: Job, result: Result) -> None:
        """Keeps a result, and writes the state and the report again."""
        more = {"job": self.identity(job), "expected": job.seconds, "predicted": self.predicted.get(job.name)}
        self.results[job.name] = result | more
        ordered = {each.name: self.results[each.name] for each in self.jobs if each.name in self.results}
        self.results = ordered
        replace(self.state, json.dumps({"commands": self.commands, "jobs": ordered}, indent=1))
        with (self.given.out / LOGS).open("a", encoding="utf-8") as file:
            file.write(f"\n===== {job.name}: {result['outcome']}\n{result.get('log', '')}")
        try:
            self.write()
        except Exception:  # the results are kept: a fault of the report must not end the jobs
            traceback.print_exc()

    def write(self) -> Path:
        """Writes the report into both folders; returns its path without extension in the second one."""
        machine = self.results.get(MACHINE, {})
        device = machine.get("device", "unknown GPU")
        about = measured.described(SCRIPT, device=device)
        about |= {"command": self.commands[0], "runs": self.commands[1:]}
        about["versions"] |= machine.get("versions", {})
        about["git_commit"] = self.given.commit or about["git_commit"]
        about |= {"small": self.given.small, "large": self.given.large}
        jobs = {name: {key: value for key, value in one.items() if key != "log"} for name, one in self.results.items()}
        content = {"about": about, "jobs": jobs}
        body = f"{self.sizes}\n\n{gpu_tables.report(self.results, self.jobs)}"
        name = f"{measured.short_name(self.given.device, device)}-proof"
        for folder in (self.given.out, self.given.results):
            measured.write(folder / name, content, body)
        return Path(self.given.results / name)

    @property
    def sizes(self) -> str:
        """What a step consists of, as a list."""
        lines = []
        for which, shape in ((SMALL, self.given.small), (LARGE, self.given.large)):
            size = sizes_of(shape)
            both = " and ".join(f"{kind} " + ", ".join(f"{n} {v}" for n, v in size[kind].items()) for kind in size)
            lines.append(f"- {which}: {shape}; {both}".replace("_", " "))
        return "\n".join(lines)

    @property
    def open(self) -> list[str]:
        """The jobs that another call would run."""
        return [job.name for job in self.jobs if not self.is_done(job.name)]


def replace(path: Path, text: str) -> None:
    """Writes a file that is complete at any time."""
    aside = path.with_suffix(".new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def chosen(jobs: Sequence[Job], patterns: str) -> list[Job]:
    """The jobs that match one of the patterns, and those that they need. Raises SystemExit for one without a match."""
    names = {name for pattern in patterns.split(",") for name in matching(jobs, pattern)}
    names |= {job.needs for job in jobs if job.name in names}
    return [job for job in jobs if job.name in names | {MACHINE}]


def matching(jobs: Sequence[Job], pattern: str) -> list[str]:
    """The names of the jobs that match. Raises SystemExit if none does."""
    found = fnmatch.filter([job.name for job in jobs], pattern)
    if not found:
        raise SystemExit(f"--only must name jobs, not {pattern}. Jobs: {', '.join(job.name for job in jobs)}")
    return found


def run(proof: Proof, workers: Workers, clock: Clock = time.monotonic) -> None:
    """Runs what isn't done yet, as far as the time reaches: what failed before comes last. Where no command starts on
    the machine, that is the end: every later job would fail too, and use up the time that a second call needs."""
    given, begin = proof.given, clock()
    scale = max(1.0, given.seconds / SECONDS)  # with more time, each job may take longer: not every GPU is an H100
    todo = sorted((job for job in proof.jobs if not proof.is_done(job.name)), key=proof.was_tried)
    for number, job in enumerate(todo, 1):
        left = given.seconds - (clock() - begin) - RESERVE
        if reason := blocked(proof, job, left):
            proof.add(job, {"outcome": LEFT_OUT, "error": reason, "seconds": 0.0})
            print(f"{job.name}: {LEFT_OUT}, {reason}", flush=True)
            continue
        start = clock()
        worker = workers.next(is_last=number == len(todo))
        order = {
            **job.values, "name": job.name, "kind": job.kind, "device": given.device, "work": str(given.work),
            "answer": str(given.work / ANSWER), "forked": workers.forked,
        }  # fmt: skip
        result = worker.run(order, min(left, scale * (PATIENCE * job.seconds + GRACE)))
        proof.add(job, result | {"seconds": round(clock() - start, 1)})
        print(gpu_tables.line(job.name, proof.results[job.name], job.seconds), flush=True)
        if job.kind == MACHINE and not proof.is_done(job.name):
            print("Mend this first: no other job was started.", flush=True)
            return


def blocked(proof: Proof, job: Job, left: float) -> str:
    """Why a job can't start; empty if it can."""
    if left < ENOUGH * job.seconds:
        return f"only {max(left, 0.0):.0f} s left"
    if job.needs and proof.results.get(job.needs, {}).get("outcome") != FINISHED:
        return f"{job.needs} did not finish"
    return ""


def main(words: list[str] | None = None) -> int:
    """Measures, shows and saves; 0 if every job has run, else 1."""
    given, begin = parse(words), time.monotonic()
    jobs = every_job(given.small, given.large)
    if given.predict:
        upstream.hush()
        content = {"small": given.small, "large": given.large, "jobs": gpu_predictions.predict(jobs)}
        given.predict.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return 0
    given.work = given.work.resolve()
    for folder in (given.out, given.work):
        folder.mkdir(parents=True, exist_ok=True)
    proof = Proof(given, chosen(jobs, given.only))
    workers = Workers(given.work, given.device, forked=given.processes == "forked")
    try:
        run(proof, workers)
    finally:
        workers.end()
    path = proof.write()
    print(f"\n{gpu_tables.report(proof.results, proof.jobs)}\n\nWrote {path}.md and {path.name}.json")
    print(f"{time.monotonic() - begin:.0f} s" + (f"; not done: {', '.join(proof.open)}" if proof.open else ""))
    return int(bool(proof.open))


if __name__ == "__main__":
    sys.exit(main())
