"""`lerobot-vla0 record`: the scripted expert plays LIBERO tasks into a LeRobotDataset like
`lerobot/libero`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from .config import MAX_STEPS, VLA0LiberoEnv

# The control frequency is 20 Hz, but `lerobot/libero` says 10; what trains on one must train on the other.
FPS = 10
IMAGE_KEYS = ("observation.images.image", "observation.images.image2")
STATE_NAMES = ["x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"]
ACTION_NAMES = ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"]
# An action below this in all six deltas, with the gripper unchanged, is a no-op (OpenVLA's filter of LIBERO's
# data).
NO_OP = 1e-4


@dataclass
class RecordConfig:
    """What to record."""

    # Folder of the new data set.
    out: Path
    # LIBERO suite; the expert solves libero_object.
    suite: str = "libero_object"
    # Task ids of the suite.
    tasks: list[int] = field(default_factory=lambda: [0])
    # Episodes tried per task; episode i starts from LIBERO's stored init state i. Only successful ones are
    # kept.
    episodes: int = 5
    # Side of the camera images in pixels.
    image_size: int = 256
    # Store the images as video (AV1), as `lerobot/libero` does. Otherwise as PNG inside the parquet files.
    video: bool = False
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Seed of the simulator.
    seed: int = 7


def features(image_size: int, video: bool) -> dict[str, dict[str, Any]]:
    """LeRobotDataset features with the keys and shapes of `lerobot/libero`."""
    image = {
        "dtype": "video" if video else "image",
        "shape": (image_size, image_size, 3),
        "names": ["height", "width", "channel"],
    }
    return {
        **dict.fromkeys(IMAGE_KEYS, image),
        "observation.state": {"dtype": "float32", "shape": (8,), "names": STATE_NAMES},
        "action": {"dtype": "float32", "shape": (7,), "names": ACTION_NAMES},
    }


def record(config: RecordConfig) -> Path:
    """Records the data set and returns its folder.

    Raises:
        FileExistsError: `out` exists.
        ValueError: no episode asked for, or an unknown suite or task.
        RuntimeError: the expert solved no episode at all.
    """
    if Path(config.out).exists():
        raise FileExistsError(f"out={str(config.out)!r} exists. Choose another folder or remove it.")
    if config.episodes < 1 or not config.tasks:
        raise ValueError(f"nothing to record: episodes={config.episodes}, tasks={config.tasks}.")
    env_config = VLA0LiberoEnv(
        task=config.suite,
        task_ids=config.tasks,
        observation_height=config.image_size,
        observation_width=config.image_size,
        assets=config.assets,
    )
    envs = env_config.create_envs(n_envs=1)[config.suite]
    to_features = env_config.get_env_processors()[0]
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create(
        repo_id=f"local/{Path(config.out).name}",
        root=config.out,
        fps=FPS,
        features=features(config.image_size, config.video),
        robot_type="panda",
        use_videos=config.video,
    )
    solved, tried = 0, 0
    progress = tqdm(total=len(envs) * config.episodes, desc="Recording", unit="episode")
    try:
        for task_id, vector_env in envs.items():
            for episode in range(config.episodes):
                frames = play_episode(vector_env, to_features, config, episode)
                tried += 1
                if frames:
                    for frame in frames:
                        dataset.add_frame(frame)
                    dataset.save_episode()
                    solved += 1
                progress.update()
                progress.set_postfix(task=task_id, success=f"{solved}/{tried}")
            vector_env.close()
    finally:
        progress.close()
        dataset.finalize()
    if not solved:
        raise RuntimeError(f"the expert solved none of {tried} episodes of {config.suite} {config.tasks}.")
    print(f"The expert solved {solved} of {tried} episodes ({100 * solved / tried:.0f} %).")
    print(f"Wrote {dataset.num_episodes} episodes, {dataset.num_frames} frames to {config.out}")
    return Path(config.out)


def play_episode(
    vector_env: gym.vector.SyncVectorEnv, to_features: Any, config: RecordConfig, init_state: int
) -> list[dict[str, Any]]:
    """Frames of one episode of the expert, without no-ops; none if it did not succeed.

    Args:
        vector_env: of one environment.
        to_features: LeRobot's processor between environment and policy, so that what is recorded is exactly
            what a policy will see.
    """
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION, preprocess_observation

    from .expert import PickAndPlaceExpert

    env = vector_env.envs[0].unwrapped
    env.init_state_id = init_state
    observation, _ = vector_env.reset(seed=config.seed, options={NEW_ROLLOUT_OPTION: True})
    expert = PickAndPlaceExpert(env._env)
    frames, gripper = [], None
    for _ in range(MAX_STEPS[config.suite]):
        action = expert.act()
        if np.abs(action[:6]).max() >= NO_OP or action[6] != gripper:
            seen = to_features(preprocess_observation(observation))
            frame = {key: (seen[key][0].permute(1, 2, 0) * 255).round().byte().numpy() for key in IMAGE_KEYS}
            frame["observation.state"] = seen["observation.state"][0].numpy()
            frame["action"] = action
            frame["task"] = env.task_description
            frames.append(frame)
        gripper = action[6]
        observation, _, terminated, _, info = vector_env.step(action[None])
        if terminated[0]:
            return frames if info["is_success"][0] else []
    return []
