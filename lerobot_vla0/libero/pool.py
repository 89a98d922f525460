"""LIBERO environments in processes of their own, each of which takes the next episode when it has ended one.

The policy acts for all environments that wait for actions, in one batch; the others step meanwhile. An
episode depends on its task, its initial state and the policy only.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lerobot.utils.io_utils import write_video

from .env import FPS, LiberoEnv
from .report import DIFFERS


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


@dataclass
class _Episode:
    job: Job
    process: Executor  # plays it
    state: Any  # the policy's
    observation: dict[str, Any] | None = None  # waits for actions
    task: str = ""
    actions: list[np.ndarray] = field(default_factory=list)

    def ask(self, function: Callable[..., Any], argument: Any) -> Future:
        try:
            return self.process.submit(function, argument)
        except BrokenProcessPool as error:  # it died while it waited for actions
            future = Future()
            future.set_exception(error)
            return future

    def answer(self, future: Future) -> Any:
        try:
            return future.result()
        except BrokenProcessPool as error:
            reason, cause = "died, maybe killed because memory was short; then lower --batch_size", error
        except Exception as error:
            reason, cause = f"failed: {type(error).__name__}: {error}", error
        name = f"{self.job.suite}, task {self.job.task_id}, episode {self.job.episode}"
        raise RuntimeError(f"the environment of {name} {reason}.") from cause


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
        context.set_forkserver_preload([LiberoEnv.__module__])
        self._processes = [ProcessPoolExecutor(1, context, _start, (settings,)) for _ in range(size)]

    def play(
        self,
        jobs: Iterable[Job],
        begin: Callable[[Job], Any],
        act: Callable[[dict[str, Any], list[str], list[Any]], np.ndarray],
        film: Callable[[Result], Path | None] = lambda result: None,
    ) -> Iterator[Result]:
        """Plays all episodes and yields each when it ends. `begin` makes the policy's state of an episode.
        `act` is the policy: observations with a batch axis, instructions, states → actions (B, n, 7). `film`
        is called after an episode was yielded, and says which video file to make of it, if any."""
        waiting, ready, running = iter(jobs), [], {}

        def begin_next(process: Executor) -> None:
            if (job := next(waiting, None)) is not None:
                episode = _Episode(job, process, begin(job))
                running[episode.ask(_reset, job)] = episode

        for process in self._processes:
            begin_next(process)
        while running or ready:
            # While an environment waits for actions, only those join it that have ended their steps already.
            for future in wait(running, 0 if ready else None, FIRST_COMPLETED).done:
                episode = running.pop(future)
                answer = episode.answer(future)
                if answer is None:  # the video is written
                    begin_next(episode.process)
                    continue
                episode.observation, episode.task, success, steps = answer
                if episode.observation is not None:
                    ready.append(episode)
                    continue
                actions = np.concatenate(episode.actions)[:steps]
                yield (result := Result(episode.job, episode.task, success, steps, actions))
                if file := film(result):
                    running[episode.ask(partial(_film, file), result)] = episode
                else:
                    begin_next(episode.process)
            if ready:
                observation = _stack([episode.observation for episode in ready])
                chunks = act(observation, [e.task for e in ready], [e.state for e in ready])
                for episode, chunk in zip(ready, chunks, strict=True):
                    episode.actions.append(chunk)
                    running[episode.ask(_step, chunk)] = episode
                ready = []

    def close(self) -> None:
        for process in self._processes:
            process.shutdown()  # waits for steps and videos that have begun


def _stack(observations: list[Any]) -> Any:
    """Nested dicts of arrays, with a batch axis."""
    if isinstance(observations[0], dict):
        return {key: _stack([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)


# The functions below run in the environment's process, in its only thread that runs tasks.
_own = threading.local()  # settings, env, job, steps
Answer = tuple[dict[str, Any] | None, str, bool, int]  # observation, instruction, success, steps so far


def _start(settings: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    end_with_parent()
    _own.settings, _own.job = settings, None


def _reset(job: Job) -> Answer:
    """Begins an episode; the environment is made anew when the task changes."""
    if _own.job is None or _own.job[:2] != job[:2]:
        if _own.job is not None:
            _own.env.close()
        _own.env = LiberoEnv(job.suite, job.task_id, **_own.settings)
    observation, info = _own.env.reset(options={"init_state": job.init_state})
    _own.job, _own.steps = job, 0
    return observation, info["task"], False, 0


def _step(actions: np.ndarray) -> Answer:
    """The observation is None at the episode's end."""
    observation, _, terminated, truncated, info = _own.env.step_chunk(actions)
    _own.steps += info["steps"]
    return None if terminated or truncated else observation, info["task"], info["is_success"], _own.steps


def _film(file: Path, result: Result) -> None:
    """Plays an episode again and writes a video, the cameras side by side. If it ends differently, the file's
    name says so."""
    observation, _, success, _ = _reset(result.job)
    frames = [np.hstack([*observation["pixels"].values()])]
    for action in result.actions:
        observation, _, terminated, truncated, info = _own.env.step_chunk(action[None])
        frames.append(np.hstack([*observation["pixels"].values()]))
        success = info["is_success"]
        if terminated or truncated:
            break
    if (success, len(frames) - 1) != (result.success, result.steps):
        file = file.with_stem(file.stem + DIFFERS)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_video(file, frames, FPS)


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of spawned processes: a process with a GL context or threads must not be forked."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=end_with_parent)


def end_with_parent() -> None:
    """Ends this process when the process that started it is gone, also if that was killed: a worker would
    wait for ever on a queue whose other end it holds itself."""

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)  # from a thread, sys.exit would end the thread only

    threading.Thread(target=watch, daemon=True).start()
