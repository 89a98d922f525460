"""`lerobot-vla0 bench eval`: episodes of LIBERO per minute, here, in LeRobot's rollout and in a plain loop.

All play the same recorded episodes, from the same initial states, so that lengths and success are real and
the policy costs nothing; `--policy_ms` makes it wait each time, as if a GPU computed. Each measurement runs
in a process of its own.
"""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import check_place
from ..libero import VLA0LiberoEnv
from ..libero.assets import prepare_libero
from ..libero.pool import EnvironmentPool, Job, worker_pool
from .random_vlm import check_names, write_results

SUITE = "libero_object"
MODES = {
    "loop": "one environment, every step rendered, all frames in memory (as vla0-trl and TinyVLA)",
    "lerobot": "LeRobot's batched rollout: every step rendered, until the last environment is done",
    "ours": "what `lerobot-vla0 eval` does",
}


@dataclass
class BenchEvalConfig:
    """What to measure."""

    # Folder of a data set of one task that examples/libero_demo/record.py has recorded without noise.
    dataset: Path
    # Of: loop, lerobot, ours.
    modes: list[str] = field(default_factory=lambda: list(MODES))
    # Actions that the policy gives each time, of each measurement.
    n_action_steps: list[int] = field(default_factory=lambda: [1, 8])
    # Time that the policy takes for any number of environments, in milliseconds.
    policy_ms: float = 0.0
    # Environments that run side by side, but for the loop.
    batch_size: int = 2
    # Side of the camera images in pixels.
    image_size: int = 256
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "primitive"
    # Folder for eval.json.
    out: Path = Path("outputs/bench")


@dataclass
class Episodes:
    task: int
    init_states: list[int]
    actions: list[np.ndarray]  # (T, 7) of each episode


def bench_eval(config: BenchEvalConfig) -> dict[str, Any]:
    """Measures, prints a table, writes `eval.json` and returns the results.

    Raises:
        ValueError: a mode that does not exist.
    """
    check_names("modes", config.modes, MODES)
    out, episodes, rows = check_place(config.out, "folder"), read_episodes(config.dataset), []
    for steps in config.n_action_steps:
        for mode in config.modes:
            with worker_pool(1) as process:
                rows.append(process.submit(measure, config, episodes, mode, steps).result())
            print(f"{mode}, {steps} actions each time: {rows[-1]['episodes_per_min']:.1f} episodes a minute")
    return write_results(out / "eval.json", config, platform.processor() or platform.machine(), rows)


def read_episodes(folder: Path) -> Episodes:
    """The actions of a recorded data set."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # takes seconds

    recorded = json.loads((folder / "recording.json").read_text())["episodes"]
    frames = LeRobotDataset("local/bench", root=folder).hf_dataset.select_columns(["episode_index", "action"])
    actions, numbers = np.asarray(frames["action"]), np.asarray(frames["episode_index"])
    per_episode = [actions[numbers == i].astype(np.float32) for i in range(len(recorded))]
    return Episodes(recorded[0]["task_id"], [episode["init_state"] for episode in recorded], per_episode)


def measure(config: BenchEvalConfig, episodes: Episodes, mode: str, steps: int) -> dict[str, Any]:
    """Plays all episodes: successes, and episodes per minute and CPU seconds without making environments."""
    prepare_libero(SUITE, config.assets)
    play = {"loop": _loop, "lerobot": _lerobot, "ours": _ours}[mode]
    with closing(play(config, episodes, steps)) as run:
        next(run)  # makes the environments
        start = time.perf_counter()
        successes = next(run)
        minutes = (time.perf_counter() - start) / 60
    speed = len(episodes.actions) / minutes
    return {"mode": mode, "n_action_steps": steps, "successes": successes, "episodes_per_min": speed}


def _loop(config: BenchEvalConfig, episodes: Episodes, steps: int) -> Iterator[Any]:
    from lerobot.envs.libero import LiberoEnv, _get_suite

    size = {"observation_width": config.image_size, "observation_height": config.image_size}
    suite = _get_suite(SUITE)
    with closing(LiberoEnv(suite, episodes.task, SUITE, obs_type="pixels_agent_pos", **size)) as env:
        env.reset(seed=7)
        yield None
        successes = 0
        for env.init_state_id, actions in zip(episodes.init_states, episodes.actions, strict=True):
            frames = [env.reset(seed=7)[0]["pixels"]]
            for step, action in enumerate(actions):
                if step % steps == 0:
                    time.sleep(config.policy_ms / 1000)
                observation, _, terminated, _, info = env.step(action)
                frames.append(observation["pixels"])
                if terminated:
                    break
            successes += bool(info["is_success"])
        yield successes


class _Replay(nn.Module):
    """A policy for LeRobot's rollout that plays recorded actions."""

    def __init__(self, config: BenchEvalConfig, steps: int) -> None:
        super().__init__()
        self.config, self.steps, self.actions, self.step = config, steps, [], 0

    def reset(self) -> None:
        self.step = 0

    def select_action(self, batch: dict[str, Any]) -> Tensor:
        if self.step % self.steps == 0:
            time.sleep(self.config.policy_ms / 1000)
        self.step += 1
        return torch.from_numpy(np.stack([plan[min(self.step, len(plan)) - 1] for plan in self.actions]))


def _lerobot(config: BenchEvalConfig, episodes: Episodes, steps: int) -> Iterator[Any]:
    from lerobot.scripts.lerobot_eval import rollout

    size = {"observation_width": config.image_size, "observation_height": config.image_size}
    env_config = VLA0LiberoEnv(task=SUITE, task_ids=[episodes.task], assets=config.assets, **size)
    envs = env_config.create_envs(config.batch_size, use_async_envs=True)[SUITE][episodes.task]
    policy, count = _Replay(config, steps), len(episodes.actions)
    with closing(envs):
        envs.reset()
        yield None
        successes = 0
        for start in range(0, count, config.batch_size):
            # There are always batch_size environments; episodes beyond the last are played for nothing.
            rows = [min(start + i, count - 1) for i in range(config.batch_size)]
            envs.call("set_init_states", [episodes.init_states[row] for row in rows])
            policy.actions = [episodes.actions[row] for row in rows]
            processors = env_config.get_env_processors()
            data = rollout(envs, policy, *processors, lambda batch: batch, lambda action: action)
            successes += int(data["success"].any(1)[: count - start].sum())
        yield successes


def _ours(config: BenchEvalConfig, episodes: Episodes, steps: int) -> Iterator[Any]:
    def act(observation: Any, tasks: list[str], queues: list[list[np.ndarray]]) -> list[np.ndarray]:
        time.sleep(config.policy_ms / 1000)
        return [queue.pop(0) for queue in queues]

    def play(length: int, count: int) -> int:
        jobs = [Job(SUITE, episodes.task, i, state) for i, state in enumerate(episodes.init_states[:count])]
        chunks = [np.split(actions, range(length, len(actions), length)) for actions in episodes.actions]
        return sum(result.success for result in pool.play(jobs, lambda job: list(chunks[job.episode]), act))

    with closing(
        EnvironmentPool(config.batch_size, image_size=config.image_size, assets=config.assets)
    ) as pool:
        play(999, config.batch_size)  # makes the environments
        yield None
        yield play(steps, len(episodes.actions))
