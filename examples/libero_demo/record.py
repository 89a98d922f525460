"""Records a scripted expert in LIBERO as a LeRobotDataset with the features of `lerobot/libero`.

python examples/libero_demo/record.py --out=outputs/data --tasks=[2] --episodes=20 --noise=0.15 --workers=2
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import draccus
import numpy as np
from expert import SUITE, PickAndPlaceExpert
from instructions import goals_in_scene, options_of
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from tqdm import tqdm

from lerobot_vla0.files import check_place
from lerobot_vla0.libero.assets import prepare_libero
from lerobot_vla0.libero.env import CAMERAS, LiberoEnv, check_cameras
from lerobot_vla0.libero.pool import worker_pool
from lerobot_vla0.libero.suites import check_task_ids

# As in `lerobot/libero`, though the control frequency is 20 Hz: a policy can be trained on both data sets.
FPS = 10
STATE_NAMES = ["x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"]
ACTION_NAMES = ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"]
# An action below this in all six deltas, with the gripper unchanged, is a no-op (the rule by which OpenVLA
# filtered LIBERO's data).
NO_OP = 1e-4
SEED = 7  # of the noise

Frames = list[dict[str, Any]]  # of one episode, as `LeRobotDataset.add_frame` takes them


@dataclass
class RecordConfig:
    """Which episodes to record."""

    # Folder of the new data set.
    out: Path
    # Task ids of libero_object.
    tasks: list[int] = field(default_factory=lambda: [0])
    # Episodes to play per task. Only successful ones are recorded.
    episodes: int = 5
    # Episodes to play for each of the five other instructions that a scene allows. Without them a policy need
    # not read: the scene alone tells it what to do.
    other_episodes: int = 0
    # Number of frames to record of each episode, from its start; 0: all frames of successful episodes. The
    # instruction matters most at the start, so short episodes teach a policy to read.
    first_frames: int = 0
    # Episode i starts from LIBERO's stored initial state i modulo this number; the rest of the 50 states stay
    # unseen, for evaluation.
    init_states: int = 50
    # Standard deviation of the noise on the executed deltas (actions are in [-1, 1]). The recorded actions
    # have no noise, so that a policy learns to correct deviations.
    noise: float = 0.0
    # Side of the square pictures in pixels.
    image_size: int = 256
    # Cameras: image (the scene) and image2 (the wrist).
    cameras: list[str] = field(default_factory=lambda: list(CAMERAS))
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Processes that play episodes; 1: none but this one.
    workers: int = 1


def record(config: RecordConfig) -> None:
    """Records the data set. Ctrl-C ends it early, with the episodes up to then.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: nothing to record, or an unknown task or camera.
        RuntimeError: the expert solved no episode.
    """
    check_task_ids(SUITE, config.tasks)
    check_cameras(config.cameras)
    check_place(config.out, "new folder")
    if config.episodes < 1:
        raise ValueError(f"episodes={config.episodes} must be at least 1.")
    # Downloads happen here, once: worker processes get the folder.
    config = replace(config, assets=str(prepare_libero(SUITE, config.assets)))
    dataset = LeRobotDataset.create(
        repo_id=f"local/{config.out.name}",
        root=config.out,
        fps=FPS,
        features=features(config.cameras, config.image_size),
        robot_type="panda",
        use_videos=False,
    )
    jobs = [job for task in config.tasks for job in jobs_of(config, task)]
    results = map_in_order(partial(play_episode, config), jobs, config.workers)
    recorded = []
    try:
        progress = tqdm(zip(jobs, results, strict=True), desc="Recording", unit="episode", total=len(jobs))
        for played, ((task, instruction, episode), frames) in enumerate(progress, start=1):
            if frames:
                for frame in frames:
                    dataset.add_frame(frame)
                dataset.save_episode()
                init_state = episode % config.init_states
                recorded.append({"task_id": task, "instruction": instruction, "init_state": init_state})
            progress.set_postfix(task=task, recorded=f"{len(recorded)}/{played}")
    finally:
        dataset.finalize()
        content = {"settings": asdict(config), "episodes": recorded}
        (config.out / "recording.json").write_text(json.dumps(content, indent=2, default=str))
    if not recorded:
        raise RuntimeError(f"the expert solved none of {len(jobs)} episodes of {SUITE} {config.tasks}.")
    print(f"{len(recorded)} of {len(jobs)} episodes, {dataset.num_frames} frames. Wrote {config.out}")


def features(cameras: list[str], image_size: int) -> dict[str, dict[str, Any]]:
    """LeRobotDataset features with the keys and shapes of `lerobot/libero`."""
    shape = (image_size, image_size, 3)
    image = {"dtype": "image", "shape": shape, "names": ["height", "width", "channel"]}
    return {
        **dict.fromkeys([f"{OBS_IMAGES}.{camera}" for camera in cameras], image),
        OBS_STATE: {"dtype": "float32", "shape": (8,), "names": STATE_NAMES},
        ACTION: {"dtype": "float32", "shape": (7,), "names": ACTION_NAMES},
    }


def jobs_of(config: RecordConfig, task: int) -> list[tuple[int, str, int]]:
    """(task, instruction, number) of each episode to be played in a task's scene."""
    own, *others = goals_in_scene(SUITE, task)
    jobs = [(task, own, episode) for episode in range(config.episodes)]
    return jobs + [(task, other, i) for other in others for i in range(config.other_episodes)]


def play_episode(config: RecordConfig, task: int, instruction: str, episode: int) -> Frames:
    """Frames of one episode of the expert, without no-ops: all, or none if it did not succeed; with
    `first_frames`, so many."""
    settings = {"image_size": config.image_size, "cameras": config.cameras, "assets": config.assets}
    env = switch_environment(SUITE, task, **settings)
    options = {"init_state": episode % config.init_states, **options_of(env, instruction)}
    observation, info = env.reset(options=options)
    expert = PickAndPlaceExpert(env.simulator)
    # The same noise for every instruction.
    noise = np.random.default_rng([SEED, task, episode])
    frames, gripper, ended = [], None, False
    while not ended:
        action = expert.act()
        if np.abs(action[:6]).max() >= NO_OP or action[6] != gripper:
            pictures = {f"{OBS_IMAGES}.{camera}": image for camera, image in observation["pixels"].items()}
            frames.append(
                {**pictures, OBS_STATE: observation["agent_pos"], ACTION: action, "task": info["task"]}
            )
            if len(frames) == config.first_frames:
                return frames
        gripper = action[6]
        executed = action.copy()
        executed[:6] += config.noise * noise.standard_normal(6)
        observation, _, terminated, truncated, info = env.step(np.clip(executed, -1, 1))
        ended = terminated or truncated
    return frames if info["is_success"] else []


# This process's environment and its arguments. Making one takes seconds, and one of LIBERO's larger scenes
# takes more than a gigabyte: it serves episode after episode, and is closed when the task changes.
_environment: tuple[Any, LiberoEnv] | None = None


def switch_environment(suite: str, task: int, **settings: Any) -> LiberoEnv:
    """This process's environment of a task; that of another task, or of other settings, is closed."""
    global _environment
    arguments = suite, task, settings
    if _environment is None or _environment[0] != arguments:
        if _environment is not None:
            _environment[1].close()
        _environment = arguments, LiberoEnv(suite, task, **settings)
    return _environment[1]


def map_in_order(function: Callable[..., Any], jobs: list[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """`function(*job)` of each job, in the order of the jobs, in `workers` processes; 1 calls it in this one.
    Workers are only a few results ahead of the reader: a recorded episode takes 50 MB and more."""
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    with worker_pool(min(workers, len(jobs))) as pool:
        waiting, pending = iter(jobs), deque()
        pending.extend(pool.submit(function, *job) for job in islice(waiting, 2 * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, *job) for job in islice(waiting, 1))
            yield result


if __name__ == "__main__":
    record(draccus.parse(RecordConfig))
