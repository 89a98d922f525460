"""`lerobot-vla0 eval`: the paper's LIBERO evaluation, resumable, in shards, with a report.

50 episodes per task, episode i from stored initial state i, 256×256 images, the suite's step limit, simulator
seed 7 (arXiv 2510.13054, section 4.1; its evaluation code).
"""

import json
import os
import platform
import re
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
from .config import MAX_STEPS, NUM_INIT_STATES, NUM_TASKS, VLA0LiberoEnv, check_task_ids
from .env import FPS
from .report import compare, key_of, read_episodes, write_report

PACKAGES = ("lerobot", "lerobot_policy_vla0", "transformers", "torch", "hf-libero", "robosuite", "mujoco")
# Policy fields that only say where and how fast, not what.
IGNORED_FIELDS = {
    "device",
    "pretrained_path",
    "compile_model",
    "draft_length",
    "push_to_hub",
    "repo_id",
    "private",
    "tags",
}


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
    # "3/10" runs the third of ten parts; the same command with the same folder, on any machine, runs the
    # others.
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
        if (
            self.episodes < 1
            or self.batch_size < 1
            or not 0 <= self.first_init_state <= NUM_INIT_STATES - self.episodes
        ):
            raise ValueError(
                f"episodes={self.episodes}, first_init_state={self.first_init_state}, "
                f"batch_size={self.batch_size}: at least 1 episode and environment, and initial states in "
                f"0..49."
            )

    @property
    def suite_list(self) -> list[str]:
        return [suite.strip() for suite in self.suites.split(",") if suite.strip()]

    @property
    def part(self) -> int:
        return int(self.shard.split("/")[0])

    @property
    def parts(self) -> int:
        return int(self.shard.split("/")[1])

    def batches(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """(suite, task, episodes) of every batch of the whole evaluation, in order, the same in every
        process."""
        return [
            (suite, task, group)
            for suite in self.suite_list
            for task in (self.tasks or range(NUM_TASKS[suite]))
            for group in batched(range(self.episodes), self.batch_size)
        ]


def evaluate(config: EvalConfig) -> Path:
    """Runs what is not done yet, writes the report and returns its path.

    Raises:
        ValueError: no policy, one whose actions or cameras LIBERO does not have, or a results folder with
            other settings.
    """
    if config.policy is None:
        raise ValueError("which policy? --policy.path=<checkpoint folder or Hub repo>")
    batches, settings = config.batches(), _settings(config)
    _check_settings(Path(config.out), settings)
    done = read_episodes(config.out)
    mine = batches[config.part - 1 :: config.parts]
    todo = [b for b in mine if not all((b[0], b[1], e) in done for e in b[2])]
    finished = [done[(s, t, e)] for s, t, group in mine for e in group if (s, t, e) in done]
    count, successes = len(finished), sum(episode["success"] for episode in finished)
    total = sum(len(group) for _, _, group in mine)
    if todo:
        runner = _Runner(config)
        progress = tqdm(total=total, initial=count, desc="Evaluating", unit="episode")
        try:
            for suite, task, group in todo:
                rows = [row for row in runner.run(suite, task, group) if key_of(row) not in done]
                _append(Path(config.out) / f"episodes-{config.part}of{config.parts}.jsonl", rows)
                count, successes = count + len(rows), successes + sum(row["success"] for row in rows)
                progress.update(len(rows))
                progress.set_postfix(success=f"{100 * successes / count:.1f} %", task=f"{suite} {task}")
        finally:
            progress.close()
            runner.close()
    report = write_report(config.out)
    print(report.read_text().split("## Settings")[0])
    if config.compare is not None:
        print(compare(config.out, config.compare))
    print(f"Wrote {report}")
    return report


def _settings(config: EvalConfig) -> dict[str, Any]:
    """Everything that decides the result. Two runs with equal settings may share a folder."""
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
        draft = path.with_suffix(f".{os.getpid()}")  # several shards may start at once
        draft.write_text(json.dumps(settings, indent=2))
        draft.replace(path)
        return
    before = json.loads(path.read_text())
    now = json.loads(json.dumps(settings))
    flat_before, flat_now = (
        {**s, **{f"policy.{k}": v for k, v in s["policy"].items()}} for s in (before, now)
    )
    for name in flat_now:
        if name not in ("policy", "versions") and flat_before.get(name) != flat_now[name]:
            raise ValueError(
                f"{folder} holds results of other settings: {name} was {flat_before.get(name)!r}, is "
                f"{flat_now[name]!r}. Choose another --out, or repeat the settings in {path}."
            )


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows of a batch in one write, on disk when it returns: after a kill, a batch is there whole or
    not."""
    # A line that a kill cut off would swallow the next one.
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


class _Runner:
    """Policy and, one task at a time, environments."""

    def __init__(self, config: EvalConfig) -> None:
        from lerobot.policies.factory import make_policy, make_pre_post_processors

        self.config, self.envs, self.open = config, {}, None
        env_config = self._env_config(config.suite_list[0], None)
        policy = make_policy(config.policy, env_cfg=env_config)
        cameras = set(policy.config.camera_keys) - set(env_config.features_map.values())
        if cameras:
            raise ValueError(
                f"the policy looks at {sorted(cameras)}, which LIBERO does not have; it has "
                "observation.images.image and observation.images.image2."
            )
        self.policy = policy.eval()
        self.preprocess, self.postprocess = make_pre_post_processors(
            config.policy,
            pretrained_path=str(config.policy.pretrained_path),
            preprocessor_overrides={"device_processor": {"device": str(config.policy.device)}},
        )
        self.env_processors = env_config.get_env_processors()

    def _env_config(self, suite: str, task: int | None) -> VLA0LiberoEnv:
        return VLA0LiberoEnv(
            task=suite,
            task_ids=None if task is None else [task],
            assets=self.config.assets,
            observation_height=self.config.image_size,
            observation_width=self.config.image_size,
            episode_length=self.config.max_episode_steps,
        )

    def run(self, suite: str, task: int, episodes: tuple[int, ...]) -> list[dict[str, Any]]:
        """One batch of episodes → one row each."""
        from lerobot.scripts.lerobot_eval import rollout

        env = self._open(suite, task)
        # Every batch has batch_size environments; in the last one of a task some repeat an episode, for
        # nothing.
        ids = [episodes[min(i, len(episodes) - 1)] for i in range(self.config.batch_size)]
        states = [self.config.first_init_state + episode for episode in ids]
        env.call("set_init_states", states)
        frames: list[np.ndarray] = []
        keep = (lambda e: frames.append(np.stack(e.call("render")))) if self.config.videos != "none" else None
        with torch.no_grad():
            data = rollout(
                env,
                self.policy,
                *self.env_processors,
                self.preprocess,
                self.postprocess,
                render_callback=keep,
            )
        instruction = env.call("task_description")[0]
        rows = []
        for i, episode in enumerate(episodes):
            done = data["done"][i]
            steps = int(done.int().argmax()) + 1 if done.any() else len(done)
            success = bool(data["success"][i, :steps].any())
            rows.append(
                {
                    "suite": suite,
                    "task_id": task,
                    "task": instruction,
                    "episode": episode,
                    "init_state": states[i],
                    "success": success,
                    "steps": steps,
                }
            )
            if self.config.videos == "all" or (self.config.videos == "failures" and not success):
                self._write_video([f[i] for f in frames[: steps + 1]], suite, task, episode, success)
        return rows

    def _write_video(
        self, frames: list[np.ndarray], suite: str, task: int, episode: int, success: bool
    ) -> None:
        from lerobot.utils.io_utils import write_video

        folder = Path(self.config.out) / "videos"
        folder.mkdir(exist_ok=True)
        name = f"{suite}_{task}_episode_{episode}_{'success' if success else 'failure'}.mp4"
        write_video(str(folder / name), np.stack(frames), FPS)

    def _open(self, suite: str, task: int) -> Any:
        if self.open != (suite, task):
            self.close()
            envs = self._env_config(suite, task).create_envs(
                self.config.batch_size, self.config.use_async_envs
            )
            self.envs, self.open = envs[suite][task], (suite, task)
        return self.envs

    def close(self) -> None:
        if self.open is not None:
            self.envs.close()
            self.open = None
