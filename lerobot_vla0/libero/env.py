"""LIBERO as a Gymnasium environment with two registrations: `gymnasium.make("lerobot_vla0/Libero-v0",
suite=..., task_id=...)`, and `--env.type=vla0_libero` of LeRobot's scripts.

Built on LeRobot's `LiberoEnv`, with cheaper resets and less rendering (simulator.py): pictures, robot state
and success are bit for bit those of `--env.type=libero`, in the form of the data set `lerobot/libero`.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from draccus.utils import DecodingError
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end, parse_camera_names
from lerobot.processor.env_processor import LiberoProcessorStep
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_PREFIX, OBS_STATE

from .assets import prepare_libero
from .simulator import make_simulator
from .suites import MAX_STEPS, NUM_INIT_STATES, TASKS, check_task_ids, split_suites

FPS = 20  # robosuite's control frequency
SIMULATOR_SEED = 7  # of every episode in the paper's evaluation code
MAX_IMAGE_SIZE = 2048  # pixels; an environment takes memory for four samples of each
# Pictures of an observation → LIBERO's cameras.
CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}

Observation = dict[str, Any]
Options = dict[str, Any] | None
Reset = tuple[Observation, dict[str, Any]]
Step = tuple[Observation, float, bool, bool, dict[str, Any]]  # reward, terminated, truncated, info


def check_settings(image_size: int, max_episode_steps: int | None) -> None:
    """Raises ValueError for settings that no environment can have."""
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size} must be in 1..{MAX_IMAGE_SIZE}.")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps={max_episode_steps} must be at least 1, or None.")


def check_cameras(cameras: Sequence[str]) -> None:
    """Raises ValueError unless they are some of `CAMERAS`, each once."""
    if isinstance(cameras, str) or not cameras or sorted(set(cameras) & set(CAMERAS)) != sorted(cameras):
        raise ValueError(f"cameras={cameras!r} must be one or more of {list(CAMERAS)}, each once.")


def cameras_of(policy: PreTrainedConfig) -> list[str]:
    """The `cameras` that a policy has as inputs, so that no others are rendered."""
    return [key.removeprefix(f"{OBS_IMAGES}.") for key in policy.camera_keys]


class LiberoEnv(gym.Env):
    """A robot arm (Franka Panda) follows one instruction of LIBERO at a table, controlled at 20 Hz.

    ## Action space
    float32 (7,) in [-1, 1]: changes of the end effector's position (3; 1 is 5 cm) and orientation (3; 1 is
    0.5 rad) for the operational space controller, then the gripper (-1 opens, 1 closes).

    ## Observation space
    - `pixels`: for each of `cameras`, uint8 (image_size, image_size, 3), RGB, upright. `image` is a camera
      before the table, `image2` the one on the wrist.
    - `agent_pos`: float32 (8,): the end effector's position in metres (3), its orientation as axis-angle in
      radians (3), the positions of the two fingers in metres (2).

    `info` has `is_success` (bool), `task` (the instruction), `task_id` and `init_state` (int).

    ## Reward and end
    1.0 at the step that reaches the goal, which terminates the episode, else 0.0. The step limit truncates.

    ## Reset
    Takes one of the task's 50 stored states and waits ten steps for objects to settle. Options:
    - `init_state`: which state (0..49).
    - `instruction`, `goal`: of this episode in place of the task's own. A goal is a list of LIBERO's
      predicates, for example `[["in", "milk_1", "basket_1_contain_region"]]`.

    ## Arguments
    - `suite`: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
    - `task_id`: 0..9 (libero_90: 0..89).
    - `init_state`: of every episode; None draws it with the seed of `reset`.
    - `image_size`: side of the square pictures in pixels, 1..2048.
    - `cameras`: which pictures to render. Each takes most of the time of an observation.
    - `max_episode_steps`: None takes the suite's limit (220, 280, 300, 520, 400).
    - `assets`: "auto", "real", "primitive" or a folder; see `assets.prepare_libero`.
    - `render_mode`: "rgb_array" or None. `render` returns the last picture of the first camera.

    Raises:
        ValueError: a suite, task, initial state, camera or size that does not exist; an action that is not
            finite or of another shape.
        RuntimeError (from `reset`): this process was forked from one that had rendered.
    """

    _rendering_process: ClassVar[int | None] = None  # id of the last process that made a GL context
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        suite: str = "libero_object",
        task_id: int = 0,
        *,
        init_state: int | None = None,
        image_size: int = 256,
        cameras: Sequence[str] = tuple(CAMERAS),
        max_episode_steps: int | None = None,
        assets: str = "auto",
        render_mode: str | None = "rgb_array",
    ) -> None:
        check_task_ids(suite, [task_id])
        check_settings(image_size, max_episode_steps)
        check_cameras(cameras)
        prepare_libero(suite, assets)
        from lerobot.envs.libero import LiberoEnv as LeRobotLiberoEnv
        from lerobot.envs.libero import _get_suite

        settings = {"observation_height": image_size, "observation_width": image_size, "control_freq": FPS}
        settings["obs_type"] = "pixels_agent_pos"
        self._env = LeRobotLiberoEnv(_get_suite(suite), task_id, suite, **settings)
        self.suite, self.task_id, self.render_mode = suite, task_id, render_mode
        self.task = self.task_description = self._env.task_description  # LeRobot's scripts read the latter
        self._fixed_init_state, self._image_size = init_state, image_size
        self._max_episode_steps = max_episode_steps or MAX_STEPS[suite]  # LeRobot's scripts read it
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        state = spaces.Box(-np.inf, np.inf, (8,), np.float32)
        pixels = spaces.Dict(dict.fromkeys(cameras, image))
        self.observation_space = spaces.Dict({"pixels": pixels, "agent_pos": state})
        self.action_space = self._env.action_space
        self._frame, self._cameras = None, None  # the latter is made with the simulator, at the first reset

    def _make_simulator(self) -> None:
        """In place of the simulator that LeRobot's environment would make at its first reset."""
        # A GL context that was made before a fork is broken in the new process, which would wait for ever.
        if LiberoEnv._rendering_process not in (None, os.getpid()):
            raise RuntimeError(
                f"LiberoEnv cannot render in process {os.getpid()}: it was forked from process "
                f"{LiberoEnv._rendering_process} after that one had rendered. Start environments with "
                'gymnasium.make_vec(..., vectorization_mode="async", vector_kwargs={"context": "spawn"}).'
            )
        LiberoEnv._rendering_process = os.getpid()
        if self._cameras is None:
            simulator, self._cameras = make_simulator(self._env._task_bddl_file, self._image_size, FPS)
            self._env._env, self._own_goal = simulator, simulator.env.parsed_problem["goal_state"]

    def reset(self, *, seed: int | None = None, options: Options = None) -> Reset:
        super().reset(seed=seed)
        self._make_simulator()
        options = options or {}
        init_state = options.get("init_state", self._fixed_init_state)
        if init_state is None:
            init_state = self.np_random.integers(NUM_INIT_STATES)
        if not 0 <= init_state < NUM_INIT_STATES:
            raise ValueError(f"init_state={init_state} must be in 0..{NUM_INIT_STATES - 1}.")
        self._env.init_state_id = int(init_state)
        self.task = self.task_description = options.get("instruction", self._env.task_description)
        self.simulator.env.parsed_problem["goal_state"] = options.get("goal", self._own_goal)
        self._steps = 0
        # The simulator draws random numbers before it takes the stored state: the same ones every time.
        observation, _ = self._env.reset(seed=SIMULATOR_SEED)
        self._info = {"task": self.task, "task_id": self.task_id, "init_state": int(init_state)}
        return self._observation(observation), {"is_success": False, **self._info}

    def step(self, action: np.ndarray) -> Step:
        observation, reward, terminated, truncated, info = self.step_chunk(np.asarray(action)[None])
        del info["steps"]
        return observation, reward, terminated, truncated, info

    def step_chunk(self, actions: np.ndarray, until: Callable[[], Any] | None = None) -> Step:
        """`step` for several actions (n, 7), up to success, the step limit, or the action after which
        `until()` is true. Only the last observation is returned, and only its pictures are rendered, bit for
        bit as by single steps. `info["steps"]` is the number of actions executed."""
        actions = np.asarray(actions, dtype=np.float32)
        if actions.ndim != 2 or actions.shape[1] != 7 or not len(actions) or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite, (n, 7) with n >= 1; got {actions.shape}: {actions}.")
        before = self._steps
        for action in actions:
            observation, reward, terminated, _, info = self._env.step(action)
            self._steps += 1
            truncated = not terminated and self._steps >= self._max_episode_steps
            if terminated or truncated or (until is not None and until()):
                break
        info = {"is_success": bool(info["is_success"]), **self._info, "steps": self._steps - before}
        return self._observation(observation), float(reward), bool(terminated), truncated, info

    def _observation(self, observation: dict[str, Any]) -> Observation:
        pixels = {}
        for key in self.observation_space["pixels"]:
            # LIBERO's cameras are mounted upside down; the data sets hold the images turned by 180°.
            pixels[key] = np.ascontiguousarray(self._cameras.draw(CAMERAS[key])[::-1, ::-1])
        self._frame = pixels[next(iter(pixels))]
        return {"pixels": pixels, "agent_pos": agent_position(observation["robot_state"])}

    @property
    def simulator(self) -> Any:
        """LIBERO's environment, after the first reset."""
        return self._env._env

    def render(self) -> np.ndarray | None:
        return None if self._frame is None else self._frame.copy()

    def close(self) -> None:
        self._cameras = None
        self._env.close()


def agent_position(robot_state: dict[str, Any]) -> np.ndarray:
    """LeRobot's nested robot state → its `observation.state`, float32 (8,)."""
    eef, gripper = robot_state["eef"], robot_state["gripper"]
    pos, quat, qpos = (torch.from_numpy(value)[None] for value in (eef["pos"], eef["quat"], gripper["qpos"]))
    batch = {f"{OBS_PREFIX}robot_state": {"eef": {"pos": pos, "quat": quat}, "gripper": {"qpos": qpos}}}
    return LiberoProcessorStep().observation(batch)[OBS_STATE][0].numpy()


class MakeLimit(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Lets the `max_episode_steps` of `gymnasium.make` replace the environment's own limit, which `make` does
    not pass on: it only wraps the environment in a `TimeLimit`."""

    def __init__(self, env: gym.Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        if env.spec is not None and env.spec.max_episode_steps is not None:
            env.unwrapped._max_episode_steps = env.spec.max_episode_steps


class InitStatesInTurn(LiberoEnv):
    """Environment `index` of a vector of `count` starts its episodes from the initial states index,
    index + count, index + 2 * count, ..., as LeRobot's environment does."""

    def __init__(self, index: int, count: int, suite: str, task_id: int, **settings: Any) -> None:
        super().__init__(suite, task_id, **settings)
        self._index, self._count, self._next_state = index, count, index

    def set_init_states(self, init_states: Sequence[int]) -> None:
        """The next initial state of each environment of the vector."""
        self._next_state = init_states[self._index]

    def reset(self, *, seed: int | None = None, options: Options = None) -> Reset:
        options = {"init_state": self._next_state % NUM_INIT_STATES, **(options or {})}
        self._next_state += self._count
        return super().reset(seed=seed, options=options)


@EnvConfig.register_subclass("vla0_libero")
@dataclass
class VLA0LiberoEnv(EnvConfig):
    """`LiberoEnv` for LeRobot's scripts: simulator seed 7 whatever seed the script gives, initial states in
    turn."""

    # Suite, or several separated by commas.
    task: str = "libero_object"
    # Task ids; None takes all of each suite.
    task_ids: list[int] | None = None
    fps: int = FPS
    # Step limit; None takes the suite's (220, 280, 300, 520, 400).
    episode_length: int | None = None
    # Cameras by LIBERO's names, as in LeRobot's environment.
    camera_name: str = "agentview_image,robot0_eye_in_hand_image"
    # Side of the square pictures in pixels.
    observation_height: int = 256
    observation_width: int = 256
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"

    def __post_init__(self) -> None:
        size = (self.observation_height, self.observation_width, 3)
        try:
            for suite in split_suites(self.task) or [self.task]:
                check_task_ids(suite, self.task_ids)
            if size[0] != size[1]:
                raise ValueError(f"observation_height={size[0]} and observation_width={size[1]} differ.")
        except ValueError as error:  # draccus hides its text
            raise DecodingError((), str(error)) from error
        self.features = {ACTION: PolicyFeature(FeatureType.ACTION, (7,))}
        self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (8,))
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
        for key in self.cameras:
            self.features[f"pixels/{key}"] = PolicyFeature(FeatureType.VISUAL, size)
            self.features_map[f"pixels/{key}"] = f"{OBS_IMAGES}.{key}"

    @property
    def cameras(self) -> list[str]:
        keys = {f"{camera}_image": key for key, camera in CAMERAS.items()}
        return [keys.get(name, name) for name in parse_camera_names(self.camera_name)]

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        settings = {"image_size": self.observation_height, "max_episode_steps": self.episode_length}
        return {**settings, "cameras": self.cameras}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, VectorEnv]]:
        """{suite: {task id: vector of `n_envs` environments}}."""
        envs: dict[str, dict[int, VectorEnv]] = defaultdict(dict)
        for suite in split_suites(self.task):
            # Searched for, or downloaded, once: the environments' processes get the folder.
            settings = {**self.gym_kwargs, "assets": str(prepare_libero(suite, self.assets))}
            for task in self.task_ids or range(len(TASKS[suite])):
                maker = partial(InitStatesInTurn, count=n_envs, suite=suite, task_id=task, **settings)
                makers = [partial(maker, index) for index in range(n_envs)]
                if use_async_envs and n_envs > 1:
                    envs[suite][task] = _LazyAsyncVectorEnv(makers)
                else:  # as LeRobot makes it: environments whose episode has ended wait for the others
                    makers = [freeze_after_episode_end(maker) for maker in makers]
                    envs[suite][task] = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
        return dict(envs)
