"""`lerobot-vla0 record`: episodes of the scripted expert as a LeRobotDataset like `lerobot/libero`."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import OBS_IMAGES
from tqdm import tqdm

from ..files import check_place, new_folder
from ..libero.assets import asset_name, prepare_libero
from ..libero.env import CAMERAS, MAX_IMAGE_SIZE, LiberoEnv, check_cameras
from ..libero.instructions import goals_in_scene
from ..libero.suites import MAX_STEPS, NUM_INIT_STATES, check_task_ids
from ..workers import map_in_order
from .expert import PickAndPlaceExpert

# As in `lerobot/libero`, though the control frequency is 20 Hz: the two can be trained on together.
FPS = 10
STATE_NAMES = ["x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"]
ACTION_NAMES = ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"]
# An action below this in all six deltas, with the gripper unchanged, is a no-op (the rule by which OpenVLA
# filtered LIBERO's data).
NO_OP = 1e-4
# Pixels per side of an image. Beyond it, renderers and video codecs refuse or run out of memory.
SIZES = 32, MAX_IMAGE_SIZE
# An extra file of the data set: settings, and task and initial state of each episode.
RECORD_FILE = "recording.json"


@dataclass
class RecordConfig:
    """What to record."""

    # Folder of the new data set.
    out: Path
    # LIBERO suite; the expert solves libero_object.
    suite: str = "libero_object"
    # Task ids of the suite.
    tasks: list[int] = field(default_factory=lambda: [0])
    # Episodes played per task. Only successful ones are kept.
    episodes: int = 5
    # Episodes played per further instruction that a task's scene allows (libero_object: five, to pick up
    # another object). With none, the scene tells what to do, and a policy need not read.
    other_episodes: int = 0
    # Frames kept of each episode, from its first; 0 keeps all, of those that succeed. In the first ones the
    # instruction counts most: a data set of these teaches a policy to read.
    first_frames: int = 0
    # Number of LIBERO's 50 stored initial states in use: episode i starts from state i modulo this. The
    # others are held out, for evaluation on states that the policy has never seen.
    init_states: int = 50
    # Standard deviation of the noise on the executed deltas (actions are in [-1, 1]). The data set holds the
    # expert's own actions, without the noise, so that a policy learns to correct deviations.
    noise: float = 0.0
    # Side of the camera images in pixels.
    image_size: int = 256
    # Cameras: image (the scene) and image2 (the wrist).
    cameras: list[str] = field(default_factory=lambda: list(CAMERAS))
    # Store the images as video (AV1), as `lerobot/libero` does; otherwise as PNG inside the parquet files.
    video: bool = False
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Processes that play episodes; 1 plays in this one.
    workers: int = 1
    # Seed of the noise.
    seed: int = 7


def features(cameras: list[str], image_size: int, video: bool) -> dict[str, dict[str, Any]]:
    """LeRobotDataset features with the keys and shapes of `lerobot/libero`."""
    image = {
        "dtype": "video" if video else "image",
        "shape": (image_size, image_size, 3),
        "names": ["height", "width", "channel"],
    }
    return {
        **dict.fromkeys([f"{OBS_IMAGES}.{camera}" for camera in cameras], image),
        "observation.state": {"dtype": "float32", "shape": (8,), "names": STATE_NAMES},
        "action": {"dtype": "float32", "shape": (7,), "names": ACTION_NAMES},
    }


def record(config: RecordConfig) -> Path:
    """Records the data set and returns its folder. It appears when the recording is complete; if an error or
    Ctrl-C ends it earlier, it holds the episodes until then.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: nothing to record, or a setting out of range.
        RuntimeError: the expert solved no episode at all.
    """
    _check(config)
    # Found, or downloaded, once: the workers get the folder.
    assets = prepare_libero(config.suite, config.assets)
    with new_folder(config.out) as folder:
        stopped = _record(replace(config, assets=str(assets)), folder)
    print(f"Wrote {config.out}")
    if stopped is not None:
        raise stopped
    return Path(config.out)


def check_image_size(size: int) -> None:
    """Raises ValueError for pictures that cannot be rendered."""
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"image_size={size} must be in {SIZES[0]}..{SIZES[1]} pixels.")


def check_rendered(*, init_states: int, image_size: int, workers: int, seed: int) -> None:
    """Raises ValueError for settings, of a command that renders LIBERO's scenes, that are out of range."""
    if not 1 <= init_states <= NUM_INIT_STATES:
        raise ValueError(f"init_states={init_states} must be in 1..{NUM_INIT_STATES}.")
    if workers < 1 or seed < 0:
        raise ValueError(f"workers={workers} must be at least 1, and seed={seed} at least 0.")
    check_image_size(image_size)


def _check(config: RecordConfig) -> None:
    """All settings, before anything is written."""
    if config.episodes < 1 or not config.tasks:
        raise ValueError(f"nothing to record: episodes={config.episodes}, tasks={config.tasks}.")
    check_rendered(
        init_states=config.init_states,
        image_size=config.image_size,
        workers=config.workers,
        seed=config.seed,
    )
    if not 0 <= config.noise <= 1:  # also refuses NaN
        raise ValueError(f"noise={config.noise} must be in 0..1: actions are in [-1, 1].")
    if config.other_episodes < 0:
        raise ValueError(f"other_episodes={config.other_episodes} must be at least 0.")
    if config.first_frames < 0:
        raise ValueError(f"first_frames={config.first_frames} must be at least 0.")
    check_cameras(config.cameras)
    if config.video and config.image_size % 2:
        raise ValueError(f"image_size={config.image_size} must be even for video.")
    check_task_ids(config.suite, config.tasks)
    check_place(config.out, "new folder")


def _record(config: RecordConfig, folder: Path) -> BaseException | None:
    """Writes the data set into an empty folder; returns what ended it before its last episode."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder.rmdir()  # LeRobot makes it
    dataset = LeRobotDataset.create(
        repo_id=f"local/{folder.name}",
        root=folder,
        fps=FPS,
        features=features(config.cameras, config.image_size, config.video),
        robot_type="panda",
        use_videos=config.video,
    )
    jobs = [job for task in config.tasks for job in jobs_of(config, task)]
    played = map_in_order(partial(play_episode, config), jobs, config.workers)
    kept, tried, stopped = [], 0, None
    try:
        progress = tqdm(zip(jobs, played, strict=True), desc="Recording", unit="episode", total=len(jobs))
        for tried, ((task, instruction, episode), frames) in enumerate(progress, start=1):
            for frame in frames:
                dataset.add_frame(frame)
            if frames:
                dataset.save_episode()
                init_state = episode % config.init_states
                kept.append({"task_id": task, "instruction": instruction, "init_state": init_state})
            progress.set_postfix(task=task, success=f"{len(kept)}/{tried}")
    except (Exception, KeyboardInterrupt) as error:
        if not kept:
            raise
        stopped = error
    finally:
        dataset.finalize()
    if not kept:
        raise RuntimeError(f"the expert solved none of {tried} episodes of {config.suite} {config.tasks}.")
    settings = {key: str(value) if key == "out" else value for key, value in asdict(config).items()}
    info = {"settings": settings, "asset_folder": asset_name(Path(config.assets))}
    info |= {"tried": tried, "episodes": kept}
    (folder / RECORD_FILE).write_text(json.dumps(info, indent=2))
    rate = f"{100 * len(kept) / tried:.0f} %"
    what = f"The expert solved {len(kept)} of {tried} episodes ({rate})"
    if config.first_frames:
        what = f"The first {config.first_frames} frames of {len(kept)} of {tried} episodes"
    print(f"{what}: {dataset.num_frames} frames.")
    return stopped


# The environment of this process and its arguments. Kept from episode to episode, since making one takes
# seconds; closed when the task changes, since one of LIBERO's larger scenes takes more than a gigabyte.
_environment: tuple[Any, LiberoEnv] | None = None


def switch_environment(suite: str, task: int, **settings: Any) -> LiberoEnv:
    """This process's environment of a task; the one of another task, or of other settings, is closed."""
    global _environment
    arguments = suite, task, settings
    if _environment is None or _environment[0] != arguments:
        if _environment is not None:
            _environment[1].close()
        _environment = arguments, LiberoEnv(suite, task, **settings)
    return _environment[1]


def jobs_of(config: RecordConfig, task: int) -> list[tuple[int, str, int]]:
    """(task, instruction, number) of each episode to be played in a task's scene."""
    own, *others = goals_in_scene(config.suite, task)
    jobs = [(task, own, episode) for episode in range(config.episodes)]
    return jobs + [(task, other, i) for other in others for i in range(config.other_episodes)]


def play_episode(config: RecordConfig, task: int, instruction: str, episode: int) -> list[dict[str, Any]]:
    """Frames of one episode of the expert, without no-ops: all, or none if it did not succeed; with
    `first_frames`, so many."""
    settings = {"image_size": config.image_size, "cameras": config.cameras, "assets": config.assets}
    env = switch_environment(config.suite, task, **settings)
    options = {"init_state": episode % config.init_states, "instruction": instruction}
    observation, info = env.reset(options=options)
    expert = PickAndPlaceExpert(env.simulator)
    # Equal in all instructions' episodes of one number.
    noise = np.random.default_rng([config.seed, task, episode])
    frames, gripper = [], None
    for _ in range(MAX_STEPS[config.suite]):
        action = expert.act()
        if np.abs(action[:6]).max() >= NO_OP or action[6] != gripper:
            pixels = observation["pixels"]
            frame = {f"{OBS_IMAGES}.{camera}": picture for camera, picture in pixels.items()}
            frame |= {"observation.state": observation["agent_pos"], "action": action, "task": info["task"]}
            frames.append(frame)
            if len(frames) == config.first_frames:
                return frames
        gripper = action[6]
        executed = action.copy()
        executed[:6] += config.noise * noise.standard_normal(6)
        observation, _, terminated, _, info = env.step(np.clip(executed, -1, 1))
        if terminated:
            return frames if info["is_success"] else []
    return []
