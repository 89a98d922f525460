"""`lerobot-vla0 eval`: the paper's LIBERO evaluation, resumable, in shards, with a report.

50 episodes per task, episode i from stored initial state i, 256×256 images, the suite's step limit, simulator
seed 7 (arXiv 2510.13054, section 4.1; its evaluation code).
"""

import json
import os
import platform
import re
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import batched
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from tqdm import tqdm

from ..options import PolicyOptions
from .assets import asset_name, is_primitive, prepare_libero
from .config import VLA0LiberoEnv
from .env import FPS
from .report import compare, key_of, read_episodes, write_report
from .suites import MAX_STEPS, NUM_INIT_STATES, TASKS, check_task_ids, split_suites

PACKAGES = ("lerobot", "lerobot_policy_vla0", "transformers", "torch", "hf-libero", "robosuite", "mujoco")
# Fields of the policy's config that do not change its actions.
IGNORED_FIELDS = {
    "device", "pretrained_path", "compile_model", "draft_length", "push_to_hub", "repo_id", "private", "tags",
}  # fmt: skip


@dataclass(kw_only=True)
class EvalConfig(PolicyOptions):
    """What to evaluate. `--policy.path=` names the checkpoint; its fields can be overridden
    (`--policy.device=cpu`)."""

    # Folder of the results. If it exists, the evaluation goes on where it stopped.
    out: Path
    # Suites, separated by commas.
    suites: str = "libero_spatial,libero_object,libero_goal,libero_10"
    # Task ids; None takes all of each suite.
    tasks: list[int] | None = None
    # Episodes per task; episode i starts from stored initial state first_init_state + i.
    episodes: int = 50
    # The first stored initial state (0..49).
    first_init_state: int = 0
    # Environments that run side by side.
    batch_size: int = 1
    # Each environment in a process of its own (for batch_size above 1).
    use_async_envs: bool = True
    # "3/10" runs the third of ten parts; the same command with another K and the same folder, on any machine,
    # runs another part.
    shard: str = "1/1"
    # Videos to keep: failures, all or none.
    videos: str = "failures"
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Side of the camera images in pixels.
    image_size: int = 256
    # Step limit; None takes the suite's (220, 280, 300, 520, 400).
    max_episode_steps: int | None = None
    # Another results folder to compare with, on the same initial states.
    compare: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for suite in self.suite_list:
            check_task_ids(suite, self.tasks)
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.shard) or self.part > self.parts:
            raise ValueError(f"shard={self.shard!r} must be K/N with 1 <= K <= N, for example 3/10.")
        if self.videos not in ("failures", "all", "none"):
            raise ValueError(f"videos={self.videos!r} must be failures, all or none.")
        last_start = NUM_INIT_STATES - self.episodes
        if min(self.episodes, self.batch_size) < 1 or not 0 <= self.first_init_state <= last_start:
            raise ValueError(
                f"episodes={self.episodes}, first_init_state={self.first_init_state}, "
                f"batch_size={self.batch_size}: at least 1 episode and environment, and initial states in "
                f"0..49."
            )

    @property
    def suite_list(self) -> list[str]:
        return split_suites(self.suites)

    @property
    def part(self) -> int:
        return int(self.shard.split("/")[0])

    @property
    def parts(self) -> int:
        return int(self.shard.split("/")[1])

    def batches(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """(suite, task, episodes) of every batch of the whole evaluation, in the order in which they run. The
        same in every shard."""
        return [
            (suite, task, group)
            for suite in self.suite_list
            for task in (self.tasks or range(len(TASKS[suite])))
            for group in batched(range(self.episodes), self.batch_size)
        ]


def evaluate(config: EvalConfig) -> Path:
    """Runs the episodes that are not in the results folder yet, writes the report and returns its path.

    Raises:
        ValueError: no policy, one whose actions or cameras LIBERO does not have, or a results folder with
            other settings.
    """
    config.require_policy("which policy?")
    batches, settings = config.batches(), _settings(config)
    _check_settings(Path(config.out), settings)
    done = read_episodes(config.out)
    batches = batches[config.part - 1 :: config.parts]  # of this shard
    keys = [(suite, task, episode) for suite, task, group in batches for episode in group]
    finished = [done[key] for key in keys if key in done]
    batches = [(suite, task, g) for suite, task, g in batches if any((suite, task, e) not in done for e in g)]
    if batches:
        with (
            closing(_Runner(config)) as runner,
            tqdm(total=len(keys), initial=len(finished), desc="Evaluating", unit="episode") as progress,
        ):
            for suite, task, group in batches:
                rows = [row for row in runner.run_batch(suite, task, group) if key_of(row) not in done]
                _append(Path(config.out) / f"episodes-{config.part}of{config.parts}.jsonl", rows)
                finished += rows
                rate = 100 * sum(row["success"] for row in finished) / len(finished)
                progress.update(len(rows))
                progress.set_postfix(success=f"{rate:.1f} %", task=f"{suite} {task}")
    report = write_report(config.out)
    print(report.read_text().split("## Settings")[0])
    if config.compare is not None:
        print(compare(config.out, config.compare))
    print(f"Wrote {report}")
    return report


def _settings(config: EvalConfig) -> dict[str, Any]:
    """Everything that the results depend on. Two runs with equal settings may share a folder."""
    folders = [prepare_libero(suite, config.assets) for suite in config.suite_list]
    policy = draccus.encode(config.policy, PreTrainedConfig)
    return {
        "policy_path": str(config.policy.pretrained_path),
        "policy": {key: value for key, value in policy.items() if key not in IGNORED_FIELDS},
        "suites": config.suites,
        "tasks": config.tasks,
        "episodes": config.episodes,
        "first_init_state": config.first_init_state,
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "max_episode_steps": config.max_episode_steps
        or {suite: MAX_STEPS[suite] for suite in config.suite_list},
        "assets": [asset_name(folder) for folder in folders],
        "stand_in_assets": any(is_primitive(folder) for folder in folders),
        "episodes_in_all": sum(len(group) for _, _, group in config.batches()),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.is_file():
        draft = path.with_suffix(f".{os.getpid()}")  # replaced in one step: shards may start at once
        draft.write_text(json.dumps(settings, indent=2))
        draft.replace(path)
        return
    before, now = (
        {**s, **{f"policy.{name}": value for name, value in s["policy"].items()}}
        for s in (json.loads(path.read_text()), json.loads(json.dumps(settings)))
    )
    for name in now:
        if name not in ("policy", "versions") and before.get(name) != now[name]:
            raise ValueError(
                f"{folder} holds results of other settings: {name} was {before.get(name)!r}, is "
                f"{now[name]!r}. Choose another --out, or repeat the settings in {path}."
            )


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes all rows of a batch at once and flushes them to disk, so that a kill does not lose finished
    batches."""
    # The next line must not be appended to one that was cut off by a kill.
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


class _Runner:
    """The policy, and the environments of one task at a time."""

    def __init__(self, config: EvalConfig) -> None:
        from lerobot.policies.factory import make_policy

        from ..processor_vla0 import load_processors

        self.config, self.env, self.current_task = config, None, None
        env_config = self._env_config(config.suite_list[0], None)
        policy = make_policy(config.policy, env_cfg=env_config)
        cameras = set(policy.config.camera_keys) - set(env_config.features_map.values())
        if cameras:
            raise ValueError(
                f"the policy looks at {sorted(cameras)}, which LIBERO does not have; it has "
                "observation.images.image and observation.images.image2."
            )
        self.policy = policy.eval()
        self.preprocess, self.postprocess = load_processors(config.policy, config.policy.pretrained_path)
        self.env_processors = env_config.get_env_processors()

    def _env_config(self, suite: str, task_ids: list[int] | None) -> VLA0LiberoEnv:
        return VLA0LiberoEnv(
            task=suite,
            task_ids=task_ids,
            assets=self.config.assets,
            observation_height=self.config.image_size,
            observation_width=self.config.image_size,
            episode_length=self.config.max_episode_steps,
        )

    def switch_task(self, suite: str, task: int) -> None:
        """Makes `self.env` a vector of `batch_size` environments of this task."""
        if self.current_task == (suite, task):
            return
        self.close()
        config = self._env_config(suite, [task])
        self.env = config.create_envs(self.config.batch_size, self.config.use_async_envs)[suite][task]
        self.current_task = suite, task

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = self.current_task = None

    def run_batch(self, suite: str, task: int, episodes: tuple[int, ...]) -> list[dict[str, Any]]:
        """Plays one batch of episodes; returns one row of the results for each."""
        from lerobot.scripts.lerobot_eval import rollout

        self.switch_task(suite, task)
        # There are always batch_size environments. If fewer episodes are left, the last one is played several
        # times and counted once.
        ids = [episodes[min(i, len(episodes) - 1)] for i in range(self.config.batch_size)]
        states = [self.config.first_init_state + episode for episode in ids]
        self.env.call("set_init_states", states)
        frames: list[np.ndarray] = []  # (batch_size, H, W, 3) uint8 for each timestep
        videos = self.config.videos
        keep = None if videos == "none" else lambda env: frames.append(np.stack(env.call("render")))
        with torch.no_grad():
            data = rollout(
                self.env,
                self.policy,
                *self.env_processors,
                self.preprocess,
                self.postprocess,
                render_callback=keep,
            )
        instruction = self.env.call("task_description")[0]
        rows = []
        for i, episode in enumerate(episodes):
            done = data["done"][i]
            steps = int(done.int().argmax()) + 1 if done.any() else len(done)
            success = bool(data["success"][i, :steps].any())
            row = {"suite": suite, "task_id": task, "task": instruction, "episode": episode}
            rows.append({**row, "init_state": states[i], "success": success, "steps": steps})
            if videos == "all" or (videos == "failures" and not success):
                self._write_video(rows[-1], np.stack([frame[i] for frame in frames[: steps + 1]]))
        return rows

    def _write_video(self, row: dict[str, Any], frames: np.ndarray) -> None:
        from lerobot.utils.io_utils import write_video

        folder = Path(self.config.out) / "videos"
        folder.mkdir(exist_ok=True)
        outcome = "success" if row["success"] else "failure"
        name = f"{row['suite']}_{row['task_id']}_episode_{row['episode']}_{outcome}.mp4"
        write_video(str(folder / name), frames, FPS)
