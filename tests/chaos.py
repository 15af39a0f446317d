"""Ends runs in every phase, resumes each, and compares its end with an unbroken one. They are killed with SIGKILL at
random moments of random phases, or an error, an exit or a lack of memory is injected.

    python tests/chaos.py --kills 48 --ends 108 --output benchmarks/results/cpu-chaos

Runs are forked from one process that has loaded the libraries, so that most of a run is its work. A run says in memory
that it shares with this process which phase it is in; the moment of a kill is drawn from a phase, one of the times that
an unbroken run was in it, and a delay up to its mean duration.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

PHASES = ("loading", "sampling", "scoring", "learning", "saving", "ending")
KILL, WAYS = "kill", ("raise", "exit", "out of memory")
LIMIT = 300  # seconds, of one run
STEPS_IN_ALL = 5
STEPS = (
    "--max-steps",
    str(STEPS_IN_ALL),
    "--save-steps",
    "1",
    "--per-device-train-batch-size",
    "4",
    "--max-length",
    "128",
)
SCORE = ("--max-completion-length", "8", "--reward", "{reward}")
REUSE = ("--gradient-accumulation-steps", "2", "--set", "num_iterations=2", "--set", "steps_per_generation=4")
STAGES = {
    "sft": ("sft", "--data", "{rows}/sft.jsonl", "--lora-dropout", "0.1", *STEPS),
    "reward, 8-bit": ("reward", "--data", "{rows}/pairs.jsonl", "--load-in-8bit", *STEPS),
    "reward, thumbs": ("reward", "--data", "{rows}/thumbs.jsonl", "--gradient-accumulation-steps", "2", *STEPS),
    "rloo": ("rl", "--data", "{rows}/prompts.jsonl", "--num-generations", "2", *SCORE, *STEPS, *REUSE),
    "rloo, 4-bit": ("rl", "--data", "{rows}/prompts.jsonl", "--num-generations", "2", "--load-in-4bit", *SCORE, *STEPS),
    "reinforce": ("rl", "--data", "{rows}/prompts.jsonl", "--algorithm", "reinforce", *SCORE, *STEPS, *REUSE),
}


class Board:
    """Memory shared with a run: the phase that it is in, and how often and how long it was in each."""

    SLOT, CLOCK, SLOTS = struct.Struct("Qd"), struct.Struct("d"), 64

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)

    def begin(self) -> None:
        """Start a run in its first phase."""
        self.memory[:] = bytes(len(self.memory))
        self.CLOCK.pack_into(self.memory, 8, time.monotonic())
        self.enter(0)

    @property
    def phase(self) -> int:
        return self.memory[0]

    def read(self, phase: int) -> tuple[int, float]:
        """How often the run entered a phase, and its seconds there without those of nested phases."""
        found: tuple[int, float] = self.SLOT.unpack_from(self.memory, self.SLOTS + phase * self.SLOT.size)
        return found

    def enter(self, phase: int) -> None:
        """Enter a phase, and count it."""
        self._switch(phase)
        count, seconds = self.read(phase)
        self.SLOT.pack_into(self.memory, self.SLOTS + phase * self.SLOT.size, count + 1, seconds)

    @contextmanager
    def inside(self, phase: int) -> Iterator[None]:
        """Enter a phase for a while; then the enclosing one continues."""
        outer = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def close(self) -> None:
        """The run has ended: count its last phase."""
        self._switch(self.phase)

    def _switch(self, phase: int) -> None:
        now, place = time.monotonic(), self.SLOTS + self.phase * self.SLOT.size
        (since,) = self.CLOCK.unpack_from(self.memory, 8)
        count, seconds = self.SLOT.unpack_from(self.memory, place)
        self.SLOT.pack_into(self.memory, place, count, seconds + now - since)
        self.CLOCK.pack_into(self.memory, 8, now)
        self.memory[0] = phase


@dataclass(frozen=True)
class Moment:
    """When a run is to be killed: some seconds after it entered a phase for the nth time."""

    phase: int
    nth: int
    delay: float


@dataclass(frozen=True)
class Fault:
    """An injected end: in a phase, when a run enters it for the nth time; in most phases after the work is done."""

    phase: int
    nth: int
    way: str

    def raise_in(self, phase: int, count: int) -> None:
        """End the run if this is the place."""
        if (phase, count) != (self.phase, self.nth):
            return
        if self.way == "exit":
            raise SystemExit(3)
        if self.way == "raise":
            raise ValueError("injected")
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@dataclass
class Kill:
    """A kill or an injected end that took place."""

    stage: str
    phase: str  # that the run was in, which may follow the phase that was drawn
    steps: int  # of its newest checkpoint
    again: str = "exact"  # what became of the run
    way: str = KILL


def marked(board: Board, fault: Fault | None) -> Iterator[Any]:
    """The patches that make a run report its phases, and end in one of them."""
    from transformers import Trainer

    from perlcli.run import checkpoints, lifecycle
    from perlcli.training import loop
    from perlcli.training.algorithms import Rloo

    places: list[tuple[Any, str, str]] = [
        (Rloo, "_generate", "sampling"),
        (Rloo, "_calculate_rewards", "scoring"),
        (Trainer, "training_step", "learning"),
        (Trainer, "_save_checkpoint", "saving"),
        (checkpoints, "keep", "saving"),
    ]
    for owner, name, phase in places:
        yield mock.patch.object(owner, name, timed(getattr(owner, name), board, PHASES.index(phase), fault))
    train, begin = loop._train, lifecycle.Run.begin

    def training(*args: Any) -> None:
        train(*args)
        board.enter(PHASES.index("ending"))  # until the process is gone
        if fault:
            fault.raise_in(PHASES.index("ending"), 1)

    def beginning(run: Any) -> None:
        begin(run)
        if fault:
            fault.raise_in(PHASES.index("loading"), 1)

    yield mock.patch.object(loop, "_train", training)
    yield mock.patch.object(lifecycle.Run, "begin", beginning)


def timed(function: Callable[..., Any], board: Board, phase: int, fault: Fault | None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with board.inside(phase):
            count = board.read(phase)[0]
            result = function(*args, **kwargs)
            if fault:
                fault.raise_in(phase, count)
            return result

    return call


def start(words: Sequence[str], board: Board, log: Path, fault: Fault | None = None) -> int:
    """Fork a run of perlcli; returns its process id."""
    board.begin()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(place, stream)
        for patch in marked(board, fault):
            patch.start()
        from perlcli.cli.app import app

        try:
            app(list(words), standalone_mode=True)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        sys.stdout.flush()
    finally:
        os._exit(code)


def wait(child: int, board: Board, moment: Moment | None) -> tuple[int | None, str]:
    """Wait for a run, or kill it at a moment; returns its exit code (None if it was killed) and its last phase."""
    ends, due = time.monotonic() + LIMIT, None
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), PHASES[board.phase]
        now = time.monotonic()
        if moment and due is None and board.read(moment.phase)[0] >= moment.nth:
            due = now + moment.delay
        if (due is not None and now >= due) or now > ends:
            phase = PHASES[board.phase]
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert now <= ends, f"a run took more than {LIMIT} seconds"
            return (None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)), phase
        time.sleep(0.0005)


class Chaos:
    """Kills and resumes runs of several stages, and compares them with unbroken ones."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.board, self.random = folder, Board(), random.Random(seed)
        self.kills: list[Kill] = []
        self.visits: dict[str, list[tuple[int, float]]] = {}  # by stage, of each phase: how often and how long

    def prepare(self, stages: Sequence[str]) -> None:
        """Write the data, train a reward, and run each stage unbroken."""
        from perlcli import coffee

        kinds = {
            "sft": coffee.demonstrations,
            "pairs": coffee.preferences,
            "thumbs": coffee.thumbs,
            "prompts": coffee.prompts,
        }
        for name, rows in kinds.items():
            lines = [json.dumps(row) + "\n" for row in rows("train", 10)]  # an epoch is 2 or 3 steps
            (self.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        reward = ("reward", "--data", f"{self.folder}/pairs.jsonl", *STEPS, "--output", f"{self.folder}/reward")
        self._finish(reward)
        for stage in stages:
            self._finish([*self.words(stage), "--output", str(self._place(stage, "run"))])
            self.board.close()
            self.visits[stage] = [self.board.read(phase) for phase in range(len(PHASES))]
            self._place(stage, "run").rename(self._place(stage, "unbroken"))

    def words(self, stage: str) -> list[str]:
        """The command line of a stage."""
        return [word.format(rows=self.folder, reward=self.folder / "reward") for word in STAGES[stage]]

    def trial(self, stage: str, kills: int, report: Callable[[Kill], None]) -> None:
        """Kill one run of a stage several times, resume it each time, and compare its end."""
        run, done = self._place(stage, "run"), []
        line = [*self.words(stage), "--output", str(run)]
        for _ in range(kills):
            moment = self._moment(stage, done, self._steps(run))
            words = line if not done else [*line, "--resume"]
            code, phase = wait(start(words, self.board, self._log(stage)), self.board, moment)
            if code is not None:  # it ended first
                assert code == 0, self._log(stage).read_text()[-3000:]
                break
            done.append(Kill(stage, phase, self._steps(run)))
        if not self._is_finished(run):
            self._finish([*line, "--resume"])
        wrong = self._differences(stage)
        for kill in done:
            kill.again = "differs: " + ", ".join(wrong[:3]) if wrong else "exact"
            self.kills.append(kill)
            report(kill)
        shutil.rmtree(run)

    def end(self, stage: str, phase: str, way: str, report: Callable[[Kill], None]) -> None:
        """End one run of a stage by an injected fault, check that it left its last complete step, resume it, and
        compare its end."""
        run, place = self._place(stage, "run"), PHASES.index(phase)
        line = [*self.words(stage), "--save-steps", "50", "--output", str(run)]
        count = self.visits[stage][place][0]
        fault = Fault(place, self.random.randint(1, max(1, count)), way)
        if phase == "saving":  # once: there is only the checkpoint of the last step
            fault = Fault(place, self.random.randint(1, 2), way)
        code, _ = wait(start(line, self.board, self._log(stage), fault), self.board, None)
        assert code == (3 if way == "exit" else 1), self._log(stage).read_text()[-3000:]
        steps = [json.loads(row)["step"] for row in lines_of(run / "metrics.jsonl")]
        ended = Kill(stage, phase, self._steps(run), way=way)
        if ended.steps != max(steps, default=0):
            ended.again = f"no checkpoint of step {max(steps)}"
        self._finish([*line, "--resume"])
        wrong = self._differences(stage)
        ended.again = "differs: " + ", ".join(wrong[:3]) if wrong else ended.again
        self.kills.append(ended)
        report(ended)
        shutil.rmtree(run)

    def ends(self, stages: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Stages, phases and ways to end, without repeating a pair of phase and way until all have had their turn."""
        while True:
            places = [(phase, way) for phase in PHASES for way in WAYS]
            self.random.shuffle(places)
            for phase, way in places:
                has = [stage for stage in stages if self.visits[stage][PHASES.index(phase)][0]]
                if has:
                    yield self.random.choice(has), phase, way

    def _moment(self, stage: str, done: Sequence[Kill], steps: int) -> Moment:
        """A moment still to come in one of the phases of a stage that were hit least."""
        kills = [kill for kill in [*self.kills, *done] if kill.stage == stage and kill.way == KILL]
        hits = Counter(PHASES.index(kill.phase) for kill in kills)
        phases = [phase for phase, (count, _) in enumerate(self.visits[stage]) if count]
        phase = self.random.choice([phase for phase in phases if hits[phase] == min(hits[other] for other in phases)])
        count, seconds = self.visits[stage][phase]
        to_come = max(1, count * (STEPS_IN_ALL - steps) // STEPS_IN_ALL)
        return Moment(phase, self.random.randint(1, to_come), self.random.uniform(0, seconds / count))

    def _finish(self, words: Sequence[str]) -> None:
        log = self.folder / "log"
        code, _ = wait(start(words, self.board, log), self.board, None)
        assert code == 0, log.read_text()[-3000:]

    def _differences(self, stage: str) -> list[str]:
        from unbroken import differences

        return differences(self._place(stage, "unbroken"), self._place(stage, "run"))

    def _steps(self, run: Path) -> int:
        from perlcli.run import checkpoints

        return max(map(checkpoints.step_of, checkpoints.found(run / "checkpoints")), default=0)

    def _is_finished(self, run: Path) -> bool:
        record = run / "record.json"
        return record.exists() and json.loads(record.read_text(encoding="utf-8"))["status"] == "finished"

    def _place(self, stage: str, name: str) -> Path:
        return self.folder / f"{stage} {name}"

    def _log(self, stage: str) -> Path:
        return self.folder / f"{stage} log"


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def warm() -> None:
    """Import once what every run imports."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import bitsandbytes  # noqa: F401
    import torch

    import perlcli.commands.reward
    import perlcli.commands.rl
    import perlcli.commands.sft  # noqa: F401

    torch.set_num_threads(1)


def table(chaos: Chaos) -> str:
    """The kills by stage and phase, and below them the injected ends by their way and phase."""
    kills = Counter((kill.stage, kill.phase) for kill in chaos.kills if kill.way == KILL)
    ends = Counter((kill.way, kill.phase) for kill in chaos.kills)
    counts = [(stage, [kills[stage, phase] for phase in PHASES]) for stage in chaos.visits]
    counts += [(f"any, {way}", [ends[way, phase] for phase in PHASES]) for way in WAYS]
    rows = [f"| {name} | " + " | ".join(str(count or "") for count in row) + " |" for name, row in counts if any(row)]
    return "\n".join([f"| run | {' | '.join(PHASES)} |", f"| --- |{' ---: |' * len(PHASES)}", *rows])


def keep(chaos: Chaos, output: Path, about: dict[str, Any], seconds: float) -> None:
    """Write the report as the benchmarks write theirs."""
    import measured

    exact = sum(kill.again == "exact" for kill in chaos.kills)
    killed = sum(kill.way == KILL for kill in chaos.kills)
    content = {"about": about | {"seconds": round(seconds)}, "kills": [asdict(kill) for kill in chaos.kills]}
    text = (
        f"{killed} kills with SIGKILL at random moments, some runs killed up to three times, and "
        f"{len(chaos.kills) - killed} ends by an injected error, exit or lack of memory, each of which had to leave "
        f"its last complete step; after {exact} of them the run, resumed, ended bit-equal to an unbroken one in "
        "weights, optimiser, metrics and samples. The phase is the one that the run was in when it was killed.\n\n"
        f"{table(chaos)}"
    )
    measured.write(output, content, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=48, help="at least so many: every kind of run is tried as often")
    parser.add_argument("--ends", type=int, default=0, help="so many injected errors, exits and lacks of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--output", type=Path, help="write a report here, as .md and .json")
    arguments = parser.parse_args()
    warm()
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import measured

    about = measured.described("tests/chaos.py")  # before the runs: the code may change while they are at work
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        chaos = Chaos(Path(folder), arguments.seed)
        chaos.prepare(arguments.stages)
        while len(chaos.kills) < arguments.kills:
            for stage in arguments.stages:
                chaos.trial(stage, chaos.random.randint(1, 3), partial(print, flush=True))
        for _, (stage, phase, way) in zip(range(arguments.ends), chaos.ends(arguments.stages), strict=False):
            chaos.end(stage, phase, way, partial(print, flush=True))
        if arguments.output:
            keep(chaos, arguments.output, about, time.monotonic() - begun)
        print(table(chaos))
    return int(any(kill.again != "exact" for kill in chaos.kills))


if __name__ == "__main__":
    sys.exit(main())
