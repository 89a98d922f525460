"""Pictures and where their objects are, for a VLM that knows nothing yet: `python -m
lerobot_vla0.demo.captions --out=<folder>` writes a data set that `trl sft` trains on.

VLA-0 begins with a VLM that finds what it is told to pick up. One with random weights would have to learn
that from actions, where the instruction decides a small part of what there is to predict: too small a part to
be learned in an hour on a CPU (lerobot_vla0/libero/README.md, "Ten tasks, one model").
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import check_place, new_folder
from ..libero.assets import asset_name, prepare_libero
from ..libero.env import CAMERAS, LiberoEnv
from ..libero.instructions import goals_in_scene
from ..libero.suites import TASKS, check_task_ids
from ..options import parse_options
from ..workers import map_in_order
from .record import RECORD_FILE, check_rendered, switch_environment

SUITE = "libero_object"  # the suite whose instructions have one object each to look for
CAMERA = "image"
PROMPT = "Where is what?"
# Coordinates are integers from 0 (left, top) to this (right, bottom).
RANGE = 100
# Layouts until the scene is reset: a reset takes as long as several pictures, but the hand wanders off.
LAYOUTS_PER_RESET = 10
STEPS_PER_LAYOUT = 2  # control steps in which the hand moves, 0.1 s
JITTER = 0.02  # metres by which an object may stand beside its place
AWAY = 4.0  # metres to the side, out of the picture, for objects that are not shown


@dataclass
class CaptionsConfig:
    """What to show. The scenes are those of libero_object; each has six of its ten objects."""

    # Folder of the new data set.
    out: Path
    # Task ids of libero_object, whose scenes are used; None takes all.
    tasks: list[int] | None = None
    # Pictures per scene, a multiple of 10. In each, some of its objects, from one to all, stand at random
    # places of the scene, and the hand is elsewhere. Where one stands alone, its name is easy to learn.
    layouts: int = 400
    # Number of LIBERO's 50 stored initial states in use, from the first; the others remain unseen.
    init_states: int = 10
    # Side of the pictures in pixels.
    image_size: int = 256
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Processes that render; 1 renders in this one.
    workers: int = 1
    # Seed of places, movements and the order in which objects are named.
    seed: int = 7


def captions(config: CaptionsConfig) -> Path:
    """Writes train.parquet, TRL's prompt-completion format with `images`, and returns its folder.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: a setting out of range.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    _check(config)
    # Assets are found, or downloaded, once: the workers get the folder.
    assets, tasks = str(prepare_libero(SUITE, config.assets)), config.tasks or list(range(len(TASKS[SUITE])))
    config = replace(config, assets=assets, tasks=tasks)
    jobs = [(task, reset) for task in tasks for reset in range(config.layouts // LAYOUTS_PER_RESET)]
    rendered = map_in_order(partial(render_layouts, config), jobs, config.workers)
    rows = [row for rows in tqdm(rendered, desc="Rendering", unit="scene", total=len(jobs)) for row in rows]
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(ImageFeature()), "prompt": message, "completion": message})
    with new_folder(config.out) as folder:
        Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
        settings = asdict(config) | {"out": str(config.out), "assets": asset_name(Path(assets))}
        (folder / RECORD_FILE).write_text(json.dumps({"settings": settings}, indent=2))
    first = rows[0]["completion"][0]["content"]
    print(f"Wrote {len(rows)} pictures to {config.out}. The first one's caption: {first}")
    return Path(config.out)


def _check(config: CaptionsConfig) -> None:
    check_task_ids(SUITE, config.tasks)
    if config.layouts < LAYOUTS_PER_RESET or config.layouts % LAYOUTS_PER_RESET:
        raise ValueError(f"layouts={config.layouts} must be a multiple of {LAYOUTS_PER_RESET}, and not 0.")
    check_rendered(
        init_states=config.init_states,
        image_size=config.image_size,
        workers=config.workers,
        seed=config.seed,
    )
    check_place(config.out, "new folder")


def render_layouts(config: CaptionsConfig, task: int, reset: int) -> list[dict[str, Any]]:
    """Rows of the data set: so many layouts of a scene, from one of its stored initial states."""
    settings = {"image_size": config.image_size, "cameras": [CAMERA], "assets": config.assets}
    env = switch_environment(SUITE, task, **settings)
    rng = np.random.default_rng([config.seed, task, reset])
    env.reset(options={"init_state": reset % config.init_states})
    names = names_of_objects(task)
    objects = list(names)
    simulator = env.simulator.env
    joints = {key: simulator.objects_dict[key].joints[0] for key in objects}
    home = {key: simulator.sim.data.get_joint_qpos(joint).copy() for key, joint in joints.items()}
    rows = []
    for _ in range(LAYOUTS_PER_RESET):
        shown = rng.permutation(objects)[: rng.integers(1, len(objects), endpoint=True)]
        for key, place in zip(objects, rng.permutation(objects), strict=True):
            pose = home[key].copy()  # position, then orientation as a quaternion; height and orientation stay
            pose[:2] = home[place][:2] + rng.uniform(-JITTER, JITTER, 2)
            pose[1] += AWAY * (key not in shown)
            simulator.sim.data.set_joint_qpos(joints[key], pose)
            simulator.sim.data.set_joint_qvel(joints[key], np.zeros(6))
        simulator.sim.forward()
        move = np.concatenate([rng.uniform(-1, 1, 3), rng.uniform(-0.2, 0.2, 3), rng.choice([-1, 1], 1)])
        observation, *_ = env.step_chunk(np.tile(move, (STEPS_PER_LAYOUT, 1)))
        points = points_of_objects(env, shown)
        text = ", ".join(f"{names[key]} {x} {y}" for key, (x, y) in points.items())
        rows.append(
            {
                "images": [Image.fromarray(observation["pixels"][CAMERA])],
                "prompt": [{"role": "user", "content": PROMPT}],
                "completion": [{"role": "assistant", "content": text}],
            }
        )
    return rows


def names_of_objects(task: int) -> dict[str, str]:
    """{the simulator's name of an object: what instructions call it} of a scene of libero_object."""
    start, end = "pick up the ", " and place it in the basket"
    return {
        goal[0][1]: instruction.removeprefix(start).removesuffix(end)
        for instruction, goal in goals_in_scene(SUITE, task).items()
    }


def points_of_objects(env: LiberoEnv, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
    """{object: (x, y)}: where an object's centre is in the picture, 0..`RANGE` from left and from top. What
    is hidden behind something, or outside the picture, counts as well, the latter at the picture's edge."""
    from robosuite.utils.camera_utils import get_camera_transform_matrix

    simulator = env.simulator.env
    matrix = get_camera_transform_matrix(simulator.sim, CAMERAS[CAMERA], 1, 1)  # a picture of side 1
    points = {}
    for key in keys:
        centre = np.append(simulator.sim.data.body_xpos[simulator.obj_body_id[key]], 1)
        x, y, depth, _ = matrix @ centre
        # LeRobot's environment turns pictures upright, which mirrors robosuite's.
        x, y = np.clip(np.round(RANGE * np.array([1 - x / depth, y / depth])), 0, RANGE).astype(int)
        points[key] = int(x), int(y)
    return points


if __name__ == "__main__":
    captions(parse_options(CaptionsConfig, "captions", sys.argv[1:]))
