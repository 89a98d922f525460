"""`lerobot-vla0 eval` in several processes, on one machine or more: `torchrun`, `accelerate launch` or `srun`
start the same command several times, each process runs its share, and the first one writes the report.

They share the results folder and nothing else. They form no process group: under `srun` there is no address
to meet at, a barrier would have to wait for hours, and the episodes are in the folder anyway. Each process
writes what it does into a file beside them (`State`), so that the first one does not wait for one that has
ended.
"""

import contextlib
import copy
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .evaluate import EvalConfig, report, run_episodes
from .evaluate import evaluate as evaluate_alone
from .report import read_episodes

# Of each launcher: the variables of a process's number, of the number of processes, and of its number on its
# machine. torchrun and accelerate launch; srun. Slurm's SLURM_NTASKS and SLURM_PROCID are also set in a batch
# script that runs once, without srun; SLURM_STEP_NUM_TASKS is not.
VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
STATES = "ranks"  # the folder of the states, in the results folder
BEAT_S = 5.0  # a process says that it is alive no more often
POLL_S = 1.0  # how often the first process looks


@dataclass(frozen=True)
class Rank:
    """One of several processes.

    Attributes:
        number: 0..count - 1.
        local: its number among those on the same machine; None if unknown.
        source: the variable that says `count`, for messages.
    """

    number: int = 0
    count: int = 1
    local: int | None = None
    source: str = ""


def find_rank(environ: Mapping[str, str]) -> Rank:
    """Which process this is, from the variables of a launcher; the only one if there are none. torchrun's go
    before Slurm's: `srun torchrun ...` starts several processes in each task.

    Raises:
        ValueError: variables that are no numbers, do not fit each other, or of which one is missing.
    """
    for number, count, local in VARIABLES:
        found = [name for name in (number, count) if name in environ]
        # Slurm sets the number alone in batch scripts.
        if not found or (found == [number] and number == "SLURM_PROCID"):
            continue
        if len(found) == 1:
            other = count if found == [number] else number
            raise ValueError(
                f"{found[0]}={environ[found[0]]!r} is set, and {other} is not. Set both, as torchrun "
                f"does, or unset {found[0]} to run all episodes in this process."
            )
        values = {name: _integer(environ, name) for name in (number, count, local) if name in environ}
        if not values[number] < values[count]:
            raise ValueError(
                f"{number}={values[number]} must be below {count}={values[count]}: processes are numbered "
                "from 0."
            )
        return Rank(values[number], values[count], values.get(local), f"{count}={values[count]}")
    return Rank()


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ[name].strip()
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name}={environ[name]!r} must be an integer of at least 0. Correct or unset it.")
    return int(text)


def own_device(device: str, local: int | None, gpus: int) -> str:
    """The GPU of a process. "cuda" becomes one of the `gpus` that the process can see, in turn. Not where the
    launcher shows each process only its own, or the user names a device more closely."""
    if device != "cuda" or local is None or gpus < 2:
        return device
    return f"cuda:{local % gpus}"


def evaluate(config: EvalConfig) -> Path | None:
    """`lerobot-vla0 eval`. Of several processes, each runs its share of the episodes; the first one waits for
    the others, writes the report and returns its path.

    Raises:
        ValueError, OSError: see `evaluate.run_episodes` and `find_rank`; or `--shard` was given to several
            processes.
        RuntimeError: the same; or, in the first process, another one has failed or is lost. The report is of
            the episodes that there are, and the same command runs the others.
    """
    rank = find_rank(os.environ)
    if rank.count == 1:
        return evaluate_alone(config)
    if config.shard is not None:
        raise ValueError(
            f"shard={config.shard!r} was given to {rank.count} processes ({rank.source}), which would all "
            "run the same part. Leave --shard out: each process takes its own part. Or start one process."
        )
    config = share_of(config, rank)
    state = State(Path(config.out), rank.number, rank.count)
    others = Others(config, rank.count) if rank.number == 0 else None
    try:
        run_episodes(config, state.alive)
    except Exception as error:  # shown by the first process, whatever it is
        with contextlib.suppress(OSError):
            state.write("failed", f"{type(error).__name__}: {error}")
        raise
    state.write("done")
    if others is None:
        print(
            f"Process {rank.number} of 0..{rank.count - 1} has done its share; process 0 writes the report."
        )
        return None
    failure = others.wait()
    file = report(config) if read_episodes(config.out) else None
    if failure:
        raise RuntimeError(failure)
    shutil.rmtree(state.file.parent)
    return file


def share_of(config: EvalConfig, rank: Rank) -> EvalConfig:
    """The config of one process: its part of the episodes, on its GPU."""
    policy, share = config.require_policy("which policy?"), copy.copy(config)
    policy.device = own_device(str(policy.device), rank.local, torch.cuda.device_count())
    share.shard = f"{rank.number + 1}/{rank.count}"
    return share


class State:
    """What a process does, as a file that the first process reads: a word, a number that changes each time,
    and a message."""

    def __init__(self, out: Path, number: int, count: int) -> None:
        self.file, self.written = out / STATES / f"{number}of{count}", -math.inf

    def alive(self) -> None:
        if time.monotonic() - self.written > BEAT_S:
            self.write("alive")

    def write(self, word: str, message: str = "") -> None:
        # Not made for a failure: a run that fails at its start leaves nothing.
        if word == "failed" and not self.file.parent.parent.is_dir():
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.written = time.monotonic()
        draft = self.file.with_suffix(".new")
        draft.write_text(f"{word} {time.time_ns()} {' '.join(message.split())}")
        draft.replace(self.file)

    def read(self) -> str:
        """ "" if there is none yet."""
        with contextlib.suppress(FileNotFoundError):
            return self.file.read_text()
        return ""


class Others:
    """The other processes, as the first one sees them. Made before the first one begins: what an earlier run
    left says nothing about this one."""

    def __init__(self, config: EvalConfig, count: int) -> None:
        self.out, self.count, self.timeout = Path(config.out), count, config.rank_timeout
        self.states = {number: State(self.out, number, count) for number in range(1, count)}
        self.before = {number: state.read() for number, state in self.states.items()}
        self.jobs = {n: {job[:3] for job in config.jobs(n + 1, count)} for n in self.states}

    def wait(self) -> str | None:
        """Returns when all are done: None, or what has happened to one that will not be."""
        self.seen = dict(self.before)  # what each wrote last
        self.heard = dict.fromkeys(self.states, time.monotonic())  # when that was seen first
        total = sum(map(len, self.jobs.values()))
        with tqdm(total=total, desc="Waiting for the other processes", unit="episode") as progress:
            while True:
                # In this order: a process writes its last episode before it is done.
                texts = {n: state.read() for n, state in self.states.items()}
                done = read_episodes(self.out).keys()
                missing = {n: len(jobs - done) for n, jobs in self.jobs.items()}
                progress.update(total - sum(missing.values()) - progress.n)
                waiting = [n for n in texts if missing[n] or not texts[n].startswith("done")]
                if not waiting:
                    return None
                for n in waiting:
                    if trouble := self._trouble(n, texts[n]):
                        return (
                            f"process {n} of 0..{self.count - 1} {trouble} {missing[n]} of its "
                            f"{len(self.jobs[n])} episodes are missing: the same command runs them."
                        )
                time.sleep(min(POLL_S, self.timeout))

    def _trouble(self, n: int, text: str) -> str | None:
        """What has happened to process `n`, whose state is `text` now; None if it may be at work."""
        if text != self.seen[n]:
            self.seen[n], self.heard[n] = text, time.monotonic()
        message = text.split(" ", 2)[2] if text.startswith("failed") else ""
        if message and text != self.before[n]:
            return f"failed ({message})."
        if time.monotonic() - self.heard[n] <= self.timeout:
            return None
        return (
            f"is lost: for {self.timeout:g} s (--rank_timeout) it has written nothing into {self.out}, which "
            "all machines must share."
            + (f" Its last message, maybe of an earlier run: {message}." if message else "")
        )
