"""The pool's own logic, with environments in threads; real processes: test_libero_evaluate.py."""

import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
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
    drift = 0.0  # added to each step

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


@pytest.fixture
def threads(monkeypatch):
    """In place of processes."""

    def executor(workers, context, start, arguments):
        return ThreadPoolExecutor(workers, initializer=start, initargs=arguments)

    monkeypatch.setattr(module, "ProcessPoolExecutor", executor)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module, "end_with_parent", lambda: None)
    monkeypatch.setattr(module, "LiberoEnv", Walk)
    Walk.made, Walk.drift = [], 0.0


JOBS = [Job("suite", task, episode, episode % 4) for task in (0, 1) for episode in range(6)]


def act(observation, tasks, memories):
    """Depends on observation, instruction and the episode so far."""
    chunks = []
    for state, task, memory in zip(observation["agent_pos"], tasks, memories, strict=True):
        memory.append(state)
        chunks.append(np.full((4, 7), 0.03 * len(memory) + 0.04 * ("1" in task) + 0.001 * state[0] % 0.01))
    return np.stack(chunks).astype(np.float32)


def play(size, jobs=JOBS, act=act, **options):
    with closing(EnvironmentPool(size, image_size=32)) as pool:
        return {result.job: result for result in pool.play(jobs, lambda job: [], act, **options)}


def test_results_do_not_depend_on_the_number_of_environments(threads):
    results = {size: play(size) for size in (1, 2, 5)}
    for other in results.values():
        assert sorted(other) == sorted(JOBS)
        for job, result in other.items():
            alone = results[1][job]
            assert (result.task, result.success, result.steps) == (alone.task, alone.success, alone.steps)
            assert np.array_equal(result.actions, alone.actions) and len(result.actions) == result.steps
    assert Walk.made[:2] == [("suite", 0), ("suite", 1)]  # one environment per task, one after the other
    alone = results[1].values()
    assert {result.success for result in alone} == {True, False}
    assert len({result.steps for result in alone}) > 3 and any(result.steps % 4 for result in alone)


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
        assert len(frames) == result.steps + 1 and (frames[0].width, frames[0].height) == (64, 32)


def test_a_replay_that_ends_differently_says_so(threads, tmp_path):
    def film(result):
        Walk.drift = 5.0
        return tmp_path / "episode.mp4"

    play(1, JOBS[:1], film=film)
    assert [path.name for path in tmp_path.iterdir()] == [f"episode{DIFFERS}.mp4"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError("oh"), "failed: ZeroDivisionError: oh"),
        (BrokenProcessPool(), "died, maybe killed because memory was short; then lower --batch_size"),
    ],
)
def test_errors_of_an_environment_name_the_episode(threads, monkeypatch, error, message):
    def fail(self, actions):
        raise error

    monkeypatch.setattr(Walk, "step_chunk", fail)
    with pytest.raises(RuntimeError, match=f"the environment of suite, task 0, episode 0 {message}"):
        play(1)
