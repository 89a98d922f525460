"""`lerobot-vla0 bench eval`: episodes of LIBERO per minute, here, in LeRobot's rollout and in a plain loop.

All play the same successful episodes of the scripted expert, recorded before, from the same initial states,
so that lengths and success are real and the policy costs nothing; `--policy_ms` makes it wait at each look,
as if a GPU computed. Each measurement runs in a process of its own; those that it starts are counted, too.
"""

import multiprocessing
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn

from ..demo.expert import PickAndPlaceExpert
from ..libero.assets import prepare_libero
from ..libero.config import VLA0LiberoEnv
from ..libero.env import LiberoEnv
from ..libero.pool import EnvironmentPool, Job
from ..libero.suites import NUM_INIT_STATES, check_task_ids
from ..workers import worker_pool
from . import common

SUITE = "libero_object"  # the expert's
MODES = {
    "loop": "one environment, every step rendered, all frames kept (as vla0-trl and TinyVLA)",
    "lerobot": "LeRobot's batched rollout: every step rendered, until the last environment is done",
    "ours": "what `eval` does",
}
SAMPLE_SECONDS = 0.5  # between readings of memory


@dataclass
class BenchEvalConfig:
    """What to measure."""

    # Of: loop, lerobot, ours.
    modes: list[str] = field(default_factory=lambda: list(MODES))
    # Actions that the policy gives at each look, of each measurement.
    n_action_steps: list[int] = field(default_factory=lambda: [1, 8])
    # Time that the policy takes for a look at any number of environments, in milliseconds.
    policy_ms: float = 0.0
    # Environments that run side by side, but for the loop.
    batch_size: int = 2
    # Episodes of each measurement; episode i starts from stored initial state i.
    episodes: int = 8
    # Task id of libero_object.
    task: int = 2
    # Side of the camera images in pixels.
    image_size: int = 256
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "primitive"
    # Measurements of each mode, in turns.
    repeats: int = 1
    # Folder for eval.json.
    out: Path = Path("outputs/bench")


def bench_eval(config: BenchEvalConfig) -> dict[str, Any]:
    """Measures, prints a table, writes `eval.json` and returns the results.

    Raises:
        ValueError: a name or number that is not allowed.
    """
    common.check_counts(config, "batch_size", "episodes", "repeats", "image_size")
    common.check_names("modes", config.modes, MODES)
    check_task_ids(SUITE, [config.task])
    if config.episodes > NUM_INIT_STATES or config.policy_ms < 0 or min(config.n_action_steps, default=0) < 1:
        raise ValueError(
            f"episodes={config.episodes} must be at most {NUM_INIT_STATES}, policy_ms={config.policy_ms} at "
            f"least 0, and n_action_steps={config.n_action_steps} a list of numbers from 1."
        )
    prepare_libero(SUITE, config.assets)
    plans = _in_a_process(record, config)
    rows = []
    for _ in range(config.repeats):
        for steps in config.n_action_steps:
            for mode in config.modes:
                rows.append(_in_a_process(measure, config, plans, mode, steps))
                print(
                    f"{mode}, {steps} actions a look: {rows[-1]['episodes_per_min']:.1f} episodes a minute",
                    flush=True,
                )
    table = summarize(pd.DataFrame(rows))
    lengths = [len(plan) for plan in plans]
    print(
        f"{config.episodes} episodes of {min(lengths)}-{max(lengths)} steps, {config.policy_ms:g} ms a look"
    )
    for name in config.modes:
        print(f"  {name}: {MODES[name]}")
    print_rows(table)
    file = Path(config.out) / "eval.json"
    machine = f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores"
    result = common.write_results(file, config, machine, table, lengths=lengths)
    print(f"Wrote {file}")
    return result


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with worker_pool(1) as process:
        return process.submit(function, *arguments).result()


def record(config: BenchEvalConfig) -> list[np.ndarray]:
    """Actions (T, 7) of the expert's episodes, each to its success."""
    plans = []
    with closing(LiberoEnv(SUITE, config.task, image_size=16, assets=config.assets)) as env:
        for episode in range(config.episodes):
            env.reset(options={"init_state": episode})
            expert, actions, done = PickAndPlaceExpert(env.simulator), [], False
            while not done:
                actions.append(expert.act())
                *_, terminated, truncated, info = env.step(actions[-1])
                done = terminated or truncated
            if not info["is_success"]:
                raise RuntimeError(f"the expert failed task {config.task} from initial state {episode}.")
            plans.append(np.stack(actions))
    return plans


def measure(config: BenchEvalConfig, plans: list[np.ndarray], mode: str, steps: int) -> dict[str, Any]:
    """Plays all episodes in this process and those that it starts.

    Returns:
        `mode`, `n_action_steps`, `successes`, `episodes_per_min` and `cpu_s` of an episode, both without
        making the environments, and `peak_gib`, proportional set size of all processes together.
    """
    prepare_libero(SUITE, config.assets)
    play = {"loop": _loop, "lerobot": _lerobot, "ours": _ours}[mode]
    with _peak_memory() as peak, closing(play(config, plans, steps)) as run:
        next(run)  # makes the environments
        cpu, start = _cpu_seconds(), time.perf_counter()
        successes = next(run)
        wall, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    return {
        "mode": mode,
        "n_action_steps": steps,
        "successes": successes,
        "episodes_per_min": 60 * len(plans) / wall,
        "cpu_s": cpu / len(plans),
        "peak_gib": max(peak) / 2**30,
    }


def _processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _cpu_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _processes())


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """A list of readings in bytes; pages that processes share count once."""
    readings, ended = [0], threading.Event()

    def read() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            try:
                readings.append(sum(process.memory_full_info().pss for process in _processes()))
            except psutil.Error:  # one has just ended
                continue

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield readings
    finally:
        ended.set()
        thread.join()


def _loop(config: BenchEvalConfig, plans: list[np.ndarray], steps: int) -> Iterator[Any]:
    from lerobot.envs.libero import LiberoEnv as LeRobotLiberoEnv
    from lerobot.envs.libero import _get_suite

    size = {"observation_width": config.image_size, "observation_height": config.image_size}
    with closing(
        LeRobotLiberoEnv(_get_suite(SUITE), config.task, SUITE, obs_type="pixels_agent_pos", **size)
    ) as env:
        env.reset(seed=7)
        yield None
        successes = 0
        for episode, plan in enumerate(plans):
            env.init_state_id = episode
            frames = [env.reset(seed=7)[0]["pixels"]]
            for step, action in enumerate(plan):
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
        self.config, self.steps, self.plans, self.step = config, steps, [], 0

    def reset(self) -> None:
        self.step = 0

    def select_action(self, batch: dict[str, Any]) -> Tensor:
        if self.step % self.steps == 0:
            time.sleep(self.config.policy_ms / 1000)
        self.step += 1
        return torch.from_numpy(np.stack([plan[min(self.step, len(plan)) - 1] for plan in self.plans]))


def _lerobot(config: BenchEvalConfig, plans: list[np.ndarray], steps: int) -> Iterator[Any]:
    from lerobot.scripts.lerobot_eval import rollout

    size = {"observation_width": config.image_size, "observation_height": config.image_size}
    env_config = VLA0LiberoEnv(task=SUITE, task_ids=[config.task], assets=config.assets, **size)
    envs = env_config.create_envs(config.batch_size, use_async_envs=True)[SUITE][config.task]
    policy = _Replay(config, steps)
    with closing(envs):
        envs.reset()
        yield None
        successes = 0
        for start in range(0, len(plans), config.batch_size):
            # There are always batch_size environments; episodes beyond the last are played for nothing.
            ids = [min(start + i, len(plans) - 1) for i in range(config.batch_size)]
            envs.call("set_init_states", ids)
            policy.plans = [plans[i] for i in ids]
            processors = env_config.get_env_processors()
            data = rollout(envs, policy, *processors, lambda batch: batch, lambda action: action)
            successes += int(data["success"].any(1)[: len(plans) - start].sum())
        yield successes


def _ours(config: BenchEvalConfig, plans: list[np.ndarray], steps: int) -> Iterator[Any]:
    def act(observation: Any, tasks: list[str], memories: list[list[np.ndarray]]) -> np.ndarray:
        time.sleep(config.policy_ms / 1000)
        return [memory.pop(0) for memory in memories]

    def play(length: int, count: int) -> int:
        jobs = [Job(SUITE, config.task, episode, episode) for episode in range(count)]
        results = pool.play(
            jobs, lambda job: [plans[job.episode][i : i + length] for i in range(0, 999, length)], act
        )
        return sum(result.success for result in results)

    settings = {"image_size": config.image_size, "assets": config.assets}
    with closing(EnvironmentPool(config.batch_size, **settings)) as pool:
        play(999, min(config.batch_size, len(plans)))  # makes the environments
        yield None
        yield play(steps, len(plans))


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians of each mode, and how many times the others' episodes per minute ours plays."""
    table = rows.groupby(["mode", "n_action_steps"], sort=False).median().reset_index()
    for other in ("loop", "lerobot"):
        speeds = table[table["mode"] == other].set_index("n_action_steps")["episodes_per_min"]
        ratio = table["episodes_per_min"] / table["n_action_steps"].map(speeds)
        table[f"times_{other}"] = ratio.where(table["mode"] == "ours")
    return table


def print_rows(table: pd.DataFrame) -> None:
    """Prints the table with its units."""
    shown = pd.DataFrame({"mode": table["mode"], "actions a look": table["n_action_steps"].astype(str)})
    shown["episodes/min"] = table["episodes_per_min"].map("{:.1f}".format)
    for other in ("loop", "lerobot"):
        ratios = table[f"times_{other}"]
        shown[f"× {other}"] = [f"{ratio:.2f}" if pd.notna(ratio) else "" for ratio in ratios]
    shown["CPU s/episode"] = table["cpu_s"].map("{:.1f}".format)
    shown["peak GiB"] = table["peak_gib"].map("{:.2f}".format)
    shown["success"] = table["successes"].map("{:.0f}".format)
    common.print_table(shown)
