"""LIBERO environments in processes of their own, each with the next episode as soon as it has ended one.

The policy is asked for all environments that wait for actions, in one batch, whatever their progress; the
others step meanwhile. What an episode does depends on its task, its initial state and the policy only, not on
the environment that plays it or on its neighbours.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .env import LiberoEnv
from .report import DIFFERS
from .video import encode, frame

CLOSE_SECONDS = 5  # until a process that does not end is killed


class Job(NamedTuple):
    """One episode."""

    suite: str
    task_id: int
    episode: int
    init_state: int


@dataclass
class Result:
    """An episode that has ended."""

    job: Job
    task: str  # the instruction
    success: bool
    steps: int
    actions: np.ndarray  # float32 (steps, 7), as executed


# Observation (None at the episode's end), instruction, success, steps since the reset.
Answer = tuple[dict[str, Any] | None, str, bool, int]
# (observations with a batch axis, instructions, memory of each episode) → actions (B, n, 7)
Act = Callable[[dict[str, Any], list[str], list[Any]], np.ndarray]


@dataclass
class _Worker:
    """A process with one environment, as its parent sees it."""

    process: Any
    pipe: Connection
    job: Job | None = None
    memory: Any = None  # what the policy remembers of the episode
    observation: dict[str, Any] | None = None  # waits for actions
    task: str = ""
    actions: list[np.ndarray] = field(default_factory=list)
    filming: bool = False

    def ask(self, *request: Any) -> None:
        try:
            self.pipe.send(request)
        except OSError as error:
            raise self._died() from error

    def answer(self) -> tuple[Any, ...]:
        try:
            kind, *answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if kind == "error":
            raise RuntimeError(f"{self._place()} failed: {answer[0]}")
        return tuple(answer)

    def _place(self) -> str:
        return f"the environment of {self.job.suite}, task {self.job.task_id}, episode {self.job.episode}"

    def _died(self) -> RuntimeError:
        self.process.join(CLOSE_SECONDS)
        return RuntimeError(
            f"{self._place()} died: its process {self.process.pid} ended with exit code "
            f"{self.process.exitcode} (-9: killed, for example because memory was short; then lower "
            "--batch_size)."
        )


class EnvironmentPool:
    """Processes with one `LiberoEnv` each, which end with this object or with this process.

    Args:
        size: number of processes.
        settings: arguments of `LiberoEnv` beyond suite and task.
    """

    def __init__(self, size: int, **settings: Any) -> None:
        # A GL context must not be forked. The server that forks these processes has none: it has only
        # imported what takes most of the time and memory of a start, once for all.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([LiberoEnv.__module__, "lerobot.processor.env_processor"])
        self._workers: list[_Worker] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is seen at `ours`
            self._workers.append(_Worker(process, ours))

    def play(
        self,
        jobs: Iterable[Job],
        begin: Callable[[Job], Any],
        act: Act,
        film: Callable[[Result], Path | None] = lambda result: None,
    ) -> Iterator[Result]:
        """Plays all episodes and yields each when it ends.

        Args:
            begin: makes what `act` remembers of an episode.
            act: the policy.
            film: called after an episode was yielded: the video file to make of it, or None.

        Raises:
            RuntimeError: an environment failed, or its process died.
        """
        waiting = iter(jobs)
        for worker in self._workers:
            self._next(worker, waiting, begin)
        while any(worker.job for worker in self._workers):
            ready = [worker for worker in self._workers if worker.observation is not None]
            busy = {w.pipe: w for w in self._workers if w.job and w.observation is None}
            # While somebody waits for actions, only those are added that have ended their steps already.
            for pipe in wait(list(busy), timeout=0 if ready else None):
                worker = busy[pipe]
                answer = worker.answer()
                if worker.filming:
                    worker.filming = False
                    self._next(worker, waiting, begin)
                elif (result := self._receive(worker, *answer)) is None:
                    ready.append(worker)
                else:
                    yield result
                    file = film(result)
                    if file is None:
                        self._next(worker, waiting, begin)
                    else:
                        worker.filming = True
                        worker.ask("film", result, file)
            if ready:
                observation = _stack([worker.observation for worker in ready])
                chunks = act(observation, [w.task for w in ready], [w.memory for w in ready])
                for worker, chunk in zip(ready, chunks, strict=True):
                    worker.observation = None
                    worker.actions.append(chunk)
                    worker.ask("step", chunk)

    def _next(self, worker: _Worker, jobs: Iterator[Job], begin: Callable[[Job], Any]) -> None:
        worker.job, worker.actions = next(jobs, None), []
        if worker.job is not None:
            worker.memory = begin(worker.job)
            worker.ask("reset", worker.job)

    def _receive(
        self, worker: _Worker, observation: dict[str, Any] | None, task: str, success: bool, steps: int
    ) -> Result | None:
        """Keeps an observation until the policy is asked, or returns the episode that has ended."""
        if observation is not None:
            worker.observation, worker.task = observation, task
            return None
        actions = np.concatenate(worker.actions)[:steps]
        return Result(worker.job, task, success, steps, actions)

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()  # ends the process when it has done what it is doing
        for worker in self._workers:
            worker.process.join(CLOSE_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []


def _stack(observations: list[Any]) -> Any:
    """Nested dicts of arrays, with a batch axis."""
    if isinstance(observations[0], dict):
        return {key: _stack([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)


def _serve(pipe: Connection, settings: dict[str, Any]) -> None:
    """Runs in the environment's process: answers requests until the other end of the pipe is closed, which
    is also what happens when the other process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the other process closes the pipe
    player = _Player(settings, lost=pipe.poll)
    try:
        while True:
            kind, *request = pipe.recv()
            try:
                answer = ("done", *(getattr(player, kind)(*request) or ()))
            except Exception as error:  # shown by the other process, whatever it is
                answer = ("error", f"{type(error).__name__}: {error}")
            pipe.send(answer)
    except (EOFError, OSError):
        pass


class _Player:
    """An environment, made anew when the task changes.

    Args:
        settings: of the environment.
        lost: says during long work whether the other process has gone (it sends nothing meanwhile).
    """

    def __init__(self, settings: dict[str, Any], lost: Callable[[], bool]) -> None:
        self.settings, self.lost, self.env, self.current, self.steps = settings, lost, None, None, 0

    def reset(self, job: Job) -> Answer:
        if self.current != (job.suite, job.task_id):
            if self.env is not None:
                self.env.close()
            self.env = LiberoEnv(job.suite, job.task_id, **self.settings)
            self.current = job.suite, job.task_id
        observation, info = self.env.reset(options={"init_state": job.init_state})
        self.steps = 0
        return observation, info["task"], False, 0

    def step(self, actions: np.ndarray) -> Answer:
        observation, _, terminated, truncated, info = self.env.step_chunk(actions)
        self.steps += info["steps"]
        ended = terminated or truncated
        return None if ended else observation, info["task"], info["is_success"], self.steps

    def film(self, result: Result, file: Path) -> None:
        """Plays an episode again and writes its video. If it ends differently, the file's name says so."""
        ended = False, 0

        def frames() -> Iterator[np.ndarray]:
            nonlocal ended
            observation, *_ = self.reset(result.job)
            yield frame(observation["pixels"], result.task, 0, None)
            for number, action in enumerate(result.actions, start=1):
                if self.lost():
                    raise EOFError("nobody waits for this video")
                observation, _, terminated, truncated, info = self.env.step_chunk(action[None])
                last = terminated or truncated or number == len(result.actions)
                ended = info["is_success"], number
                yield frame(observation["pixels"], result.task, number, info["is_success"] if last else None)
                if last:
                    return

        video = encode(frames())
        if ended != (result.success, result.steps):
            file = file.with_stem(file.stem + DIFFERS)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(video)
