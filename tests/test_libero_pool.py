"""The pool's own logic, with environments in threads; real processes: test_libero_evaluate.py."""

import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from typing import ClassVar

import av
import numpy as np
import pytest

from lerobot_vla0.libero import pool as module
from lerobot_vla0.libero.pool import EnvironmentPool, Job
from lerobot_vla0.libero.report import DIFFERS


class Walk:
    """An environment whose state is a sum of actions; episodes differ in length."""

    made: ClassVar[list[tuple[str, int]]] = []
    drift = 0.0  # added to each step: a simulation that is not deterministic

    def __init__(self, suite, task_id, **settings):
        assert settings == {"image_size": 32}
        Walk.made.append((suite, task_id))
        self.task, self.closed = f"{suite} {task_id}", False

    def observation(self):
        image = np.full((32, 32, 3), self.state % 256, np.uint8)
        return {"pixels": {"image": image, "image2": image}, "agent_pos": np.array([self.state], np.float32)}

    def reset(self, options):
        self.state, self.goal, self.left = float(options["init_state"]), 20 + 7 * options["init_state"], 30
        return self.observation(), {"task": self.task}

    def step_chunk(self, actions):
        assert not self.closed
        before = self.left
        for action in actions:
            self.state += float(action.sum()) + Walk.drift
            self.left -= 1
            terminated = self.state >= self.goal
            if terminated or not self.left:
                break
        info = {"is_success": terminated, "steps": before - self.left, "task": self.task}
        time.sleep(0.001 * (int(self.state) % 3))
        return self.observation(), float(terminated), terminated, not self.left, info

    def close(self):
        self.closed = True


class Thread(threading.Thread):
    """In place of a process."""

    pid, exitcode = 123, -9

    def __init__(self, target, args, daemon):
        super().__init__(daemon=daemon)
        self.target, self.settings = target, args[1]
        self.pipe = Connection(os.dup(args[0].fileno()))  # a process has its own, too

    def run(self):
        with self.pipe:
            self.target(self.pipe, self.settings)


@pytest.fixture
def threads(monkeypatch):
    class Context:
        Pipe, Process = staticmethod(multiprocessing.Pipe), Thread
        set_forkserver_preload = staticmethod(lambda modules: None)

    monkeypatch.setattr(module.multiprocessing, "get_context", lambda method: Context)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module, "LiberoEnv", Walk)
    Walk.made, Walk.drift = [], 0.0


JOBS = [Job("suite", task, episode, episode % 4) for task in (0, 1) for episode in range(6)]


def act(observation, tasks, memories):
    """Depends on observation, instruction and what happened in the episode before."""
    chunks = []
    for state, task, memory in zip(observation["agent_pos"], tasks, memories, strict=True):
        memory.append(state)
        chunks.append(np.full((4, 7), 0.03 * len(memory) + 0.04 * ("1" in task) + 0.001 * state[0] % 0.01))
    return np.stack(chunks).astype(np.float32)


def play(size, jobs=JOBS, act=act, **options):
    pool = EnvironmentPool(size, image_size=32)
    try:
        return {result.job: result for result in pool.play(jobs, lambda job: [], act, **options)}
    finally:
        pool.close()


def test_results_do_not_depend_on_the_number_of_environments(threads):
    results = {size: play(size) for size in (1, 2, 5)}
    for other in results.values():
        assert sorted(other) == sorted(JOBS)
        for job, result in other.items():
            alone = results[1][job]
            assert (result.task, result.success, result.steps) == (alone.task, alone.success, alone.steps)
            assert np.array_equal(result.actions, alone.actions) and len(result.actions) == result.steps
    alone = results[1].values()
    assert {result.success for result in alone} == {True, False}
    assert len({result.steps for result in alone}) > 3 and any(result.steps % 4 for result in alone)


def test_two_tasks_take_two_environments_one_after_the_other(threads):
    play(1)
    assert Walk.made == [("suite", 0), ("suite", 1)]


def test_the_policy_is_asked_for_all_that_wait(threads):
    """Those that step while the policy computes come into the next batch."""
    batches = []

    def slow(observation, tasks, memories):
        batches.append(len(tasks))
        time.sleep(0.03)
        return act(observation, tasks, memories)

    play(4, act=slow)
    assert max(batches) > 1 and sum(batches) == sum(-(-r.steps // 4) for r in play(1).values())


def test_videos_are_the_episodes_played_again(threads, tmp_path):
    play(2, JOBS[:3], film=lambda result: tmp_path / f"{result.job.episode}.mp4")
    for job, result in play(1, JOBS[:3]).items():
        with av.open(str(tmp_path / f"{job.episode}.mp4")) as video:
            frames = list(video.decode(video=0))
        assert len(frames) == result.steps + 1 and (frames[0].width, frames[0].height) == (512, 324)


def test_a_replay_that_ends_differently_says_so(threads, tmp_path):
    def film(result):
        Walk.drift = 5.0
        return tmp_path / "episode.mp4"

    play(1, JOBS[:1], film=film)
    assert [path.name for path in tmp_path.iterdir()] == [f"episode{DIFFERS}.mp4"]


def test_errors_of_an_environment_name_the_episode(threads, monkeypatch):
    monkeypatch.setattr(Walk, "step_chunk", lambda self, actions: 1 / 0)
    message = "the environment of suite, task 0, episode 0 failed: ZeroDivisionError: division by zero"
    with pytest.raises(RuntimeError, match=message):
        play(1)


def test_a_process_that_dies(threads, monkeypatch):
    def die(self, actions):
        raise SystemExit

    monkeypatch.setattr(Walk, "step_chunk", die)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"episode 0 died: its process 123 ended with exit code -9"):
        play(1)


def test_a_video_is_given_up_when_nobody_waits(threads, tmp_path):
    """As after the evaluation was killed, when the pipe's other end is closed."""
    ours, theirs = multiprocessing.Pipe()
    player = module._Player({"image_size": 32}, lost=theirs.poll)
    ours.close()
    result = module.Result(JOBS[0], "task", False, 30, np.zeros((30, 7), np.float32))
    with pytest.raises(EOFError):
        player.film(result, tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []
