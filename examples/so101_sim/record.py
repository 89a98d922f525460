"""Records the plugin's own controller as a LeRobotDataset.

PYTHONPATH=examples python -m so101_sim.record --out=outputs/so101/dataset --episodes=50
"""

from dataclasses import dataclass
from pathlib import Path

import draccus
import gymnasium
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot_env_so101.scripted import PickPlaceController

from . import ACTION_SCALE, FPS, TASK

# Share of the distance that the controller covers in one step. With its own value, 1, the arm lags behind and
# swings: actions change from step to step for reasons that no single observation contains.
GAIN = 0.6
# The controller holds still for ten steps while the jaw closes, which takes four. A policy without memory
# cannot count them: only the first ones are recorded, fewer than a chunk has, so that a chunk leads on.
HOLD_STEPS = 5
JOINTS = [f"{kind}_{joint}" for kind in ("pos", "vel") for joint in ("pan", "lift", "elbow", "flex", "roll")]
FEATURES = {
    "observation.images.front": {
        "dtype": "image",
        "shape": (128, 128, 3),
        "names": ["height", "width", "channel"],
    },
    "observation.state": {
        "dtype": "float32",
        "shape": (14,),
        "names": [*JOINTS, "gripper_command", "x", "y", "z"],
    },
    "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "grasp"]},
}


@dataclass
class RecordConfig:
    """Which episodes to record."""

    # Folder of the new data set.
    out: Path
    # Number of successful episodes.
    episodes: int = 50
    # Standard deviation of the noise on executed actions, in units of an action.
    noise: float = 0.08


def play(env: gymnasium.Env, seed: int, noise: float) -> tuple[list[dict[str, np.ndarray]], bool]:
    """(frames of one episode, its success). The actions that are executed have noise, those that are recorded
    do not: a policy learns to correct deviations."""
    observation, info = env.reset(seed=seed)
    controller, simulator = PickPlaceController(ACTION_SCALE / GAIN), env.unwrapped
    rng, frames, ended, still = np.random.default_rng(seed), [], False, 0
    while not ended:
        block = simulator.data.sensor("block_pos").data
        action = controller.act(simulator.ik_point_pos, block, simulator.goal_pos)
        still = 0 if action[:3].any() else still + 1
        if still <= HOLD_STEPS:
            image, state = observation["pixels"]["front"], observation["agent_pos"]
            frames.append({"observation.images.front": image, "observation.state": state, "action": action})
        executed = action + np.r_[rng.normal(0, 0 if still else noise, 3), 0].astype(np.float32)
        observation, _, terminated, truncated, info = env.step(executed)
        ended = terminated or truncated
    return frames, info["is_success"]


def record(config: RecordConfig) -> None:
    """Episodes of the seeds 0, 1, 2, ...; failed ones are left out."""
    env = gymnasium.make("so101_sim/SO101Place-v0")
    dataset = LeRobotDataset.create("local/so101", FPS, FEATURES, root=config.out, use_videos=False)
    seed = 0
    while dataset.num_episodes < config.episodes:
        frames, is_success = play(env, seed, config.noise)
        if is_success:
            for frame in frames:
                dataset.add_frame(frame | {"task": TASK})
            dataset.save_episode()
        else:
            print(f"seed {seed}: the controller failed")
        seed += 1
    dataset.finalize()
    env.close()
    counts = f"{dataset.num_episodes} episodes, {dataset.num_frames} frames, seeds 0..{seed - 1}"
    print(f"{counts}. Wrote {config.out}")


if __name__ == "__main__":
    record(draccus.parse(RecordConfig))
