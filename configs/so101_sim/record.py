"""Records the plugin's own controller as a LeRobotDataset.

PYTHONPATH=configs python -m so101_sim.record --out=outputs/so101/dataset --episodes=50
"""

import argparse
from pathlib import Path

import gymnasium
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot_env_so101.scripted import PickPlaceController

from . import ACTION_SCALE, FPS, TASK

# Share of the distance that the controller wants to make good in one step. With its own value, 1, the arm,
# which lags behind, swings: actions change from step to step for reasons that no single observation shows.
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


def play(env: gymnasium.Env, seed: int, noise: float) -> tuple[list[dict[str, np.ndarray]], bool]:
    """(frames of one episode, its success). The actions that are executed have noise, those that are recorded
    do not: a policy learns to correct deviations."""
    seen, info = env.reset(seed=seed)
    controller, simulator = PickPlaceController(ACTION_SCALE / GAIN), env.unwrapped
    rng, frames, ended, held = np.random.default_rng(seed), [], False, 0
    while not ended:
        block = simulator.data.sensor("block_pos").data
        action = controller.act(simulator.ik_point_pos, block, simulator.goal_pos)
        held = 0 if action[:3].any() else held + 1
        if held <= HOLD_STEPS:
            image, state = seen["pixels"]["front"], seen["agent_pos"]
            frames.append({"observation.images.front": image, "observation.state": state, "action": action})
        executed = action + np.r_[rng.normal(0, 0 if held else noise, 3), 0].astype(np.float32)
        seen, _, terminated, truncated, info = env.step(executed)
        ended = terminated or truncated
    return frames, info["is_success"]


def record(out: Path, episodes: int, noise: float) -> None:
    """Episodes of the seeds 0, 1, 2, ...; failed ones are left out.

    Raises:
        FileExistsError: `out` exists.
        ValueError: no episodes, or noise that is negative.
    """
    if episodes < 1 or not noise >= 0:
        raise ValueError(f"--episodes={episodes} must be at least 1, and --noise={noise} at least 0.")
    env = gymnasium.make("so101_sim/SO101Place-v0")
    dataset = LeRobotDataset.create("local/so101", FPS, FEATURES, root=out, use_videos=False)
    seed = 0
    while dataset.num_episodes < episodes:
        frames, is_success = play(env, seed, noise)
        if is_success:
            for frame in frames:
                dataset.add_frame(frame | {"task": TASK})
            dataset.save_episode()
        else:
            print(f"seed {seed}: the controller failed")
        seed += 1
    dataset.finalize()
    env.close()
    print(f"{dataset.num_episodes} episodes, {dataset.num_frames} frames, seeds 0..{seed - 1}, in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the new data set")
    parser.add_argument("--episodes", type=int, default=50, help="successful episodes to record")
    parser.add_argument("--noise", type=float, default=0.08, help="standard deviation, in units of an action")
    record(**vars(parser.parse_args()))
