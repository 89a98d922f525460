"""LIBERO as a Gymnasium environment, `gymnasium.make("lerobot_vla0/Libero-v0", suite=..., task_id=...)`.

Built on LeRobot's `LiberoEnv`, with what Gymnasium users expect: upright images, the robot's state as one
vector, seeds that decide the initial state, truncation at the suite's step limit.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import OBS_IMAGES

from .assets import prepare_libero
from .config import SIMULATOR_SEED
from .instructions import goal_of, goals_in_scene
from .simulator import Cameras, make_simulator
from .suites import MAX_STEPS, check_task_ids

FPS = 20  # robosuite's control frequency
MAX_IMAGE_SIZE = 2048  # pixels; an environment takes memory for four samples of each
# Pictures of an observation → LIBERO's cameras.
CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}


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
    """The `cameras` that a policy looks at, so that no others are rendered."""
    return [key.removeprefix(f"{OBS_IMAGES}.") for key in policy.camera_keys]


class LiberoEnv(gym.Env):
    """One task of LIBERO.

    Observation: `pixels` with `image` (the scene) and `image2` (the wrist camera), or those of `cameras`,
    uint8 (size, size, 3), upright as in `lerobot/libero`; `agent_pos`, float32 (8,): the end effector's
    position in metres, its orientation as axis-angle in radians, the positions of the two fingers in metres.

    Action: float32 (7,) in [-1, 1]: changes of position (3) and orientation (3) of the end effector for the
    operational space controller, then the gripper (negative opens, positive closes).

    Reward: 1 on success, else 0; success ends the episode. `info` has `is_success`, `task` (the instruction),
    `task_id` and `init_state`.

    Args:
        suite: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
        task_id: 0..9 (libero_90: 0..89).
        init_state: which of LIBERO's 50 stored initial states to start from; None draws one at each reset
            from its seed. `reset(options={"init_state": 3})` overrides it.
        instruction: of another task of the suite, to be followed in this task's scene: its goal is then the
            one that counts. None takes the task's own. `reset(options={"instruction": ...})` overrides it.
        image_size: side of the square images in pixels.
        cameras: which pictures an observation has. Each takes most of the time of a look.
        max_episode_steps: None takes the suite's limit (220, 280, 300, 520, 400). `gymnasium.make` has an
            argument of this name, too, which replaces it.
        assets: "auto", "real", "primitive" or a folder; see `prepare_libero`.
        render_mode: "rgb_array" or None.

    Raises:
        ValueError: unknown suite, task or init state, an instruction that has no goal in the scene, no
            or unknown cameras, image_size not in 1..2048, or max_episode_steps below 1.
        RuntimeError (from `reset`): this process was forked from one that renders.
    """

    _rendering_process: ClassVar[int | None] = None  # id of the last process that made a GL context
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        suite: str = "libero_object",
        task_id: int = 0,
        *,
        init_state: int | None = None,
        instruction: str | None = None,
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

        self._env = LeRobotLiberoEnv(
            task_suite=_get_suite(suite),
            task_id=task_id,
            task_suite_name=suite,
            obs_type="pixels_agent_pos",
            observation_height=image_size,
            observation_width=image_size,
            control_freq=FPS,
        )
        self.suite, self.task_id, self.render_mode = suite, task_id, render_mode
        self._fixed_instruction = instruction or self._env.task_description
        self.task = self.task_description = self._fixed_instruction
        goal_of(suite, task_id, self.task)
        self.num_init_states = len(self._env._init_states)
        self._fixed_init_state = None if init_state is None else self._check_init_state(init_state)
        self._max_episode_steps = max_episode_steps or MAX_STEPS[suite]
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(cameras, image)),
                "agent_pos": spaces.Box(-np.inf, np.inf, (8,), np.float32),
            }
        )
        self.action_space = self._env.action_space
        self._steps, self._init_state, self._frame = 0, 0, None
        self._cameras: Cameras | None = None  # with the simulator, made at the first reset

    def _check_init_state(self, init_state: int) -> int:
        if not 0 <= init_state < self.num_init_states:
            raise ValueError(f"init_state={init_state} must be in 0..{self.num_init_states - 1}.")
        return int(init_state)

    def _check_process(self) -> None:
        # A GL context that was made before a fork is broken in the new process, which would wait for ever.
        if LiberoEnv._rendering_process not in (None, os.getpid()):
            raise RuntimeError(
                f"LiberoEnv cannot render in process {os.getpid()}: it was forked from process "
                f"{LiberoEnv._rendering_process} after that one had rendered. Start environments in fresh "
                'processes: gymnasium.make_vec(..., vectorization_mode="async", vector_kwargs={"context": '
                '"spawn"}).'
            )
        LiberoEnv._rendering_process = os.getpid()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode. The seed decides the initial state, unless one is fixed by `init_state`."""
        self._check_process()
        super().reset(seed=seed)
        chosen = (options or {}).get("init_state", self._fixed_init_state)
        if chosen is None:
            chosen = self.np_random.integers(self.num_init_states)
        self._init_state, self._steps = self._check_init_state(chosen), 0
        instruction = (options or {}).get("instruction", self._fixed_instruction)
        goal = goal_of(self.suite, self.task_id, instruction)
        self._env.init_state_id = self._init_state
        if self._cameras is None:
            size = next(iter(self.observation_space["pixels"].values())).shape[0]
            # In place of the one that LeRobot's environment would make.
            self._env._env, self._cameras = make_simulator(self._env._task_bddl_file, size, FPS)
        self.task = self.task_description = instruction
        self.simulator.env.parsed_problem["goal_state"] = goal
        # The simulator draws random numbers before it takes the stored state: the same ones every time.
        observation, _ = self._env.reset(seed=SIMULATOR_SEED)
        return self._observation(observation), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.step_chunk(np.asarray(action)[None])
        del info["steps"]
        return observation, reward, terminated, truncated, info

    def step_chunk(
        self, actions: np.ndarray, until: Callable[[], Any] | None = None
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """`step` for several actions, of which only the last observation is returned, and only its pictures
        are rendered. Everything returned is bit for bit what single steps return.

        Args:
            actions: (n, 7), n at least 1. Those behind success or the step limit are not executed.
            until: asked after each action; if it says yes, the actions behind are not executed either.

        Returns:
            As `step`, of the last step executed; `info` has `steps`, the number of actions executed.

        Raises:
            ValueError: actions of another shape, or not finite.
        """
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
        info = {**self._info(bool(info["is_success"])), "steps": self._steps - before}
        return self._observation(observation), float(reward), bool(terminated), truncated, info

    def reached(self) -> list[str]:
        """Instructions whose goals hold now, of all that this scene allows (`goals_in_scene`), whichever of
        them was given. After the first reset."""
        holds = self.simulator.env._eval_predicate
        goals = goals_in_scene(self.suite, self.task_id)
        return [instruction for instruction, goal in goals.items() if all(map(holds, goal))]

    def held(self) -> list[str]:
        """Instructions of `goals_in_scene` that move an object which both fingers touch now, as robosuite
        defines a grasp. After the first reset."""
        env = self.simulator.env
        touched = [n for n, it in env.objects_dict.items() if env._check_grasp(env.robots[0].gripper, it)]
        goals = goals_in_scene(self.suite, self.task_id)
        # A predicate's first argument is what moves: "in milk_1 basket_1_contain_region".
        return [text for text, goal in goals.items() if any(moved in touched for _, moved, *_ in goal)]

    def _info(self, is_success: bool) -> dict[str, Any]:
        return {
            "is_success": is_success,
            "task": self.task,
            "task_id": self.task_id,
            "init_state": self._init_state,
        }

    def _observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        # LIBERO's cameras are mounted upside down; the data sets hold the images turned by 180°.
        pixels = {
            key: np.ascontiguousarray(self._cameras.draw(CAMERAS[key])[::-1, ::-1])
            for key in self.observation_space["pixels"]
        }
        self._frame = next(iter(pixels.values()))
        return {"pixels": pixels, "agent_pos": agent_position(observation["robot_state"])}

    @property
    def simulator(self) -> Any:
        """LIBERO's environment after the first reset, for controllers that read the simulator's state."""
        return self._env._env

    def render(self) -> np.ndarray | None:
        """The last picture of the first of `cameras`, upright, uint8 (size, size, 3)."""
        return None if self._frame is None else self._frame.copy()

    def close(self) -> None:
        self._cameras = None
        self._env.close()


class MakeLimit(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Lets the `max_episode_steps` of `gymnasium.make` replace the environment's own limit, which `make` does
    not pass on: it only wraps the environment in a `TimeLimit`."""

    def __init__(self, env: gym.Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        if env.spec is not None and env.spec.max_episode_steps is not None:
            env.unwrapped._max_episode_steps = env.spec.max_episode_steps


def agent_position(robot_state: dict[str, Any]) -> np.ndarray:
    """LeRobot's nested robot state → its `observation.state`, float32 (8,)."""
    from lerobot.envs.utils import preprocess_observation
    from lerobot.processor.env_processor import LiberoProcessorStep

    batch = {
        part: {name: np.asarray(value)[None] for name, value in values.items()}
        for part, values in robot_state.items()
    }
    features = LiberoProcessorStep().observation(preprocess_observation({"robot_state": batch}))
    return features["observation.state"][0].numpy()
