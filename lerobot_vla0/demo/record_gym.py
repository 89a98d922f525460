"""`python -m lerobot_vla0.demo.record_gym`: episodes of a scripted expert in PushT or ALOHA as a
LeRobotDataset, with the names and shapes that `lerobot-eval --env.type=pusht` (or `aloha`) gives a policy.
Needs the extra `[sims]`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.envs.configs import AlohaEnv, EnvConfig, PushtEnv
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES, OBS_STATE
from tqdm import tqdm

from ..files import check_place, new_folder
from ..libero.assets import check_rendering
from ..options import parse_options
from ..workers import map_in_order


@dataclass(frozen=True)
class Scene:
    """An environment of LeRobot's, and what its data set says."""

    config: type[EnvConfig]
    camera: str  # the key that `lerobot-eval` gives the picture
    instruction: str
    names: tuple[str, ...]  # of the action's dimensions, which are the state's


_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
SCENES = {
    # The instruction of lerobot/pusht.
    "pusht": Scene(PushtEnv, OBS_IMAGE, "Push the T-shaped block onto the T-shaped target.", ("x", "y")),
    # `lerobot-eval` gives the environment's name for the task as the instruction.
    "aloha": Scene(
        AlohaEnv,
        f"{OBS_IMAGES}.top",
        "transfer_cube",
        tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _ARM),
    ),
}


@dataclass
class GymRecordConfig:
    """What to record."""

    # Folder of the new data set.
    out: Path
    # pusht or aloha (the task AlohaTransferCube-v0).
    env: str = "pusht"
    # Episodes played.
    episodes: int = 20
    # The environment's seed of the first episode; the following ones count up from it.
    first_seed: int = 0
    # Standard deviation of the noise on the executed actions, in their units (pixels, radians). The data set
    # holds the expert's own actions, so that a policy learns to correct deviations.
    noise: float = 0.0
    # Steps after which an episode ends; None takes those of `lerobot-eval`.
    max_steps: int | None = None
    # Keep episodes that did not succeed, too.
    keep_failures: bool = False
    # Processes that play episodes; 1 plays in this one.
    workers: int = 1


def record_gym(config: GymRecordConfig) -> Path:
    """Records the data set and returns its folder.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ImportError: the simulator is not installed.
        ValueError: a setting out of range.
        RuntimeError: no episode is kept, or no library renders ALOHA off screen.
    """
    _check(config)
    with new_folder(config.out) as folder:
        kept, successes, frames = _write(config, folder)
        if not kept:
            raise RuntimeError(f"the expert solved none of {config.episodes} episodes of {config.env}.")
    print(f"Wrote {config.out}: {kept} episodes, {frames} frames; {successes} of {config.episodes} solved.")
    return Path(config.out)


def _check(config: GymRecordConfig) -> None:
    if config.env not in SCENES:
        raise ValueError(f"env={config.env!r} must be one of {', '.join(SCENES)}.")
    for name in ("episodes", "workers") + (() if config.max_steps is None else ("max_steps",)):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if config.first_seed < 0:
        raise ValueError(f"first_seed={config.first_seed} must be at least 0.")
    if not 0 <= config.noise < np.inf:  # also refuses NaN
        raise ValueError(f"noise={config.noise} must be at least 0 and finite.")
    check_place(config.out, "new folder")
    if config.env == "aloha":
        check_rendering()  # dm_control's own choice is a window, which fails without a display


def _write(config: GymRecordConfig, folder: Path) -> tuple[int, int, int]:
    """(episodes that were kept, successes, frames)."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    scene = SCENES[config.env]
    dataset, kept, successes = None, 0, 0
    seeds = [(config.first_seed + number,) for number in range(config.episodes)]
    episodes = map_in_order(partial(play_episode, config), seeds, config.workers)
    played = tqdm(episodes, desc="Recording", unit="episode", total=config.episodes)
    for frames, success in played:
        successes += success
        played.set_postfix(success=f"{successes}/{played.n + 1}")
        if not success and not config.keep_failures:
            continue
        if dataset is None:
            folder.rmdir()  # LeRobot makes it
            dataset = LeRobotDataset.create(
                repo_id=f"local/{folder.name}",
                root=folder,
                fps=scene.config().fps,
                features=_features(scene, frames[0]),
                use_videos=False,
            )
        for frame in frames:
            dataset.add_frame(frame | {"task": scene.instruction})
        dataset.save_episode()
        kept += 1
    if dataset is None:
        return 0, successes, 0
    dataset.finalize()
    return kept, successes, dataset.num_frames


def _features(scene: Scene, frame: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    vector = {"dtype": "float32", "shape": (len(scene.names),), "names": list(scene.names)}
    picture = {"dtype": "image", "shape": frame[scene.camera].shape, "names": ["height", "width", "channel"]}
    return {scene.camera: picture, OBS_STATE: vector, "action": vector}


def _expert(config: GymRecordConfig, env: Any) -> Callable[[], np.ndarray]:
    """A function that gives the next action; made after the reset."""
    if config.env == "pusht":
        from .push_planner import PushPlanner

        return PushPlanner(env).act
    from .aloha_expert import TransferExpert

    return TransferExpert(env).act


def play_episode(config: GymRecordConfig, seed: int) -> tuple[list[dict[str, np.ndarray]], bool]:
    """(frames, whether the episode succeeded). The environment is made as `lerobot-eval` makes it."""
    import gymnasium

    scene = SCENES[config.env]
    env_config = scene.config()
    if config.env == "aloha":
        env_config.task = "AlohaTransferCube-v0"
    __import__(env_config.package_name)  # registers it
    env = gymnasium.make(env_config.gym_id, disable_env_checker=True, **env_config.gym_kwargs)
    observation, _ = env.reset(seed=seed)
    act, noise = _expert(config, env.unwrapped), np.random.default_rng(seed)
    frames, success = [], False
    for _ in range(config.max_steps or env_config.episode_length):
        action = act().astype(np.float32)
        picture = observation["pixels"]
        frames.append(
            {
                scene.camera: picture["top"] if isinstance(picture, dict) else picture,
                OBS_STATE: observation["agent_pos"].astype(np.float32),
                "action": action,
            }
        )
        executed = action + config.noise * noise.standard_normal(len(action))
        if config.env == "pusht":
            executed = np.clip(executed, 0, 512)
        observation, _, terminated, truncated, info = env.step(executed.astype(np.float32))
        success = bool(info["is_success"])
        if terminated or truncated:
            break
    env.close()
    return frames, success


if __name__ == "__main__":
    record_gym(parse_options(GymRecordConfig, "record_gym", sys.argv[1:]))
