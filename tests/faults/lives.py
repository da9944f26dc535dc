"""Lives of one run: each is started by the same command and ended by a signal at a chosen moment."""

import functools
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tiny_run

from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.preemption import EXIT_STATUS

WAIT_SECONDS = 900  # ends a hang, nothing else
TAIL_BYTES = 1 << 16  # of metrics.jsonl: more than two lines of a tiny run
MOMENTS = ("while it starts", "between steps", "in a save")
# how many of the fifty, by moment and signal
PLAN = {
    ("while it starts", signal.SIGKILL): 5,
    ("while it starts", signal.SIGTERM): 5,
    ("between steps", signal.SIGKILL): 11,
    ("between steps", signal.SIGTERM): 11,
    ("in a save", signal.SIGKILL): 12,
    ("in a save", signal.SIGTERM): 6,
}


@dataclass(frozen=True)
class Kill:
    """A signal and when: after `steps` more steps (or saves), and then `fraction` of what the moment lasts."""

    moment: str
    signal: signal.Signals
    steps: int
    fraction: float


@dataclass(frozen=True)
class Death:
    """What a killed process left.

    Attributes:
      kill: the kill.
      status: of the process, as `subprocess` has it.
      start: the step it went on from.
      logged: the last step in metrics.jsonl; None where it took no step, so that the file is that of the life before.
      saved: the newest finished checkpoint, 0 for none.
      torn: names of half-written checkpoints, those of earlier lives included.
      torn_now: those of this life.
      said: all it printed.
    """

    kill: Kill
    status: int
    start: int
    logged: int | None
    saved: int
    torn: tuple[str, ...]
    torn_now: tuple[str, ...]
    said: str

    @property
    def lost(self) -> int:
        """Steps of this life that must be taken again."""
        return 0 if self.logged is None else self.logged - self.saved


def plan(seed: int) -> list[Kill]:
    """The kills of `PLAN` in a random order, each with a random moment."""
    rng = np.random.default_rng(seed)
    kinds = [kind for kind, count in PLAN.items() for _ in range(count)]
    return [
        Kill(*kinds[i], steps=int(rng.integers(1, 3 if kinds[i][0] == "in a save" else 9)), fraction=float(rng.random()))
        for i in rng.permutation(len(kinds))
    ]


class Run:
    """A run folder and the command that goes on with it."""

    def __init__(self, workdir: pathlib.Path, arguments: list[str]):
        self.workdir, self._arguments = workdir, arguments
        self._checkpoints, self._metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
        self._start_seconds = 5.0  # until its first step; measured in every life that gets so far

    def die(self, kill: Kill) -> Death:
        """One life. Raises AssertionError when the run ends before it is killed."""
        log, born, metrics = self.workdir.with_suffix(".log"), time.time(), self._metrics_inode()
        with log.open("w") as said:
            process = subprocess.Popen(**tiny_run.command("train", *self._arguments), stdout=said, stderr=said)
            try:
                self._wait_for(kill, process)
                process.send_signal(kill.signal)
                status = process.wait(WAIT_SECONDS)
            finally:
                process.kill()
                process.wait()
        logged = self._logged() if self._metrics_inode() != metrics else None  # a start writes the file anew
        torn, torn_now = sorted(entry.name for entry in self._temporary()), sorted(self._being_written(born))
        said = log.read_text()
        return Death(kill, status, _start(said), logged, self.saved(), tuple(torn), tuple(torn_now), said)

    def finish(self) -> str:
        """The last life, which nothing ends; what it printed."""
        done = tiny_run.program("train", *self._arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def saved(self) -> int:
        """The newest finished checkpoint, 0 for none."""
        with Checkpoints(self._checkpoints) as checkpoints:
            return checkpoints.latest() or 0

    def _wait_for(self, kill, process):
        born, clock, metrics = time.time(), time.monotonic(), self._metrics_inode()
        if kill.moment == "while it starts":
            time.sleep(kill.fraction * self._start_seconds)
            return
        _until(lambda: self._metrics_inode() != metrics and self._steps_taken() > 0, process)  # a start writes the file anew
        self._start_seconds = time.monotonic() - clock
        if kill.moment == "between steps":
            _until(lambda: self._steps_taken() >= kill.steps, process)
            time.sleep(kill.fraction * 0.1)
            return
        seen: set[str] = set()
        for _ in range(kill.steps):
            _until(functools.partial(self._new_save, born, seen), process)
            seen |= self._being_written(born)
        time.sleep(kill.fraction * 0.05)

    def _steps_taken(self):
        return self._logged() - _start(self.workdir.with_suffix(".log").read_text())

    def _logged(self):
        if not self._metrics.exists():
            return 0
        with self._metrics.open("rb") as file:
            file.seek(max(0, self._metrics.stat().st_size - TAIL_BYTES))
            lines = file.read().decode().splitlines()
        steps = [int(match[1]) for line in lines if (match := re.match(r'\{"step": (\d+),.*\}$', line))]
        return steps[-1] if steps else 0

    def _metrics_inode(self):
        return self._metrics.stat().st_ino if self._metrics.exists() else None

    def _being_written(self, since):
        return {entry.name for entry in self._temporary() if _changed(entry) > since}

    def _new_save(self, since, seen):
        return self._being_written(since) - seen

    def _temporary(self):
        entries = self._checkpoints.iterdir() if self._checkpoints.exists() else ()
        return [entry for entry in entries if "tmp" in entry.name]


def check(death: Death, before: int, every: int) -> None:
    """What every death must keep, `before` being the newest checkpoint when that life began.

    At most one save is under way, and the next begins only when it has ended: two distances between checkpoints can be lost.
    """
    kill, said = death.kill, death.said
    assert death.start in (before, 0), said
    assert death.saved >= before, "a finished checkpoint is gone"
    if kill.signal == signal.SIGKILL:
        assert death.status == -signal.SIGKILL
        assert death.lost <= 2 * every, death
        return
    if kill.moment == "while it starts":  # before Python listens, as after it, a shell sees 143
        assert death.status in (EXIT_STATUS, -signal.SIGTERM), said
        return
    assert death.status == EXIT_STATUS, said
    assert death.lost == 0, death
    assert said.rstrip().splitlines()[-1] == (
        f"SIGTERM: stopped after step {death.logged}, whose checkpoint is"
        f" in {_folder(said)}; run the same command again to go on from there."
    )


def table(deaths: list[Death]) -> str:
    """The figures, a row a kind of kill."""
    lines = [
        "moment | signal | kills | half-written checkpoint left | exit status | steps lost: most, in all",
        "---|---|---|---|---|---",
    ]
    for moment, number in PLAN:
        of = [death for death in deaths if (death.kill.moment, death.kill.signal) == (moment, number)]
        statuses = ", ".join(map(str, sorted({death.status for death in of})))
        torn, lost = sum(bool(death.torn_now) for death in of), [death.lost for death in of]
        lines.append(f"{moment} | {number.name} | {len(of)} | {torn} | {statuses} | {max(lost)}, {sum(lost)}")
    return "\n".join(lines)


def _start(said: str) -> int:
    match = re.search(r"continuing from step (\d+) ", said)
    return int(match[1]) if match else 0


def _folder(said: str) -> str:
    return re.search(r"^run .* in (\S+)$", said, re.MULTILINE)[1]


def _changed(path: pathlib.Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:  # it has got its own name
        return 0.0


def _until(happened: Callable[[], object], process: subprocess.Popen) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.003)
