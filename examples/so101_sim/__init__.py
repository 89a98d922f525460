"""SO-101 in simulation, for LeRobot's scripts: `--env.type=so101_place`, with PYTHONPATH=examples and
`--env.discover_packages_path=so101_sim`. README.md in this folder has the commands.

A wrapper around the plugin's `SO101PickPlace-v0` (lerobot-env-so101 0.4.0, extra [sims]) for a policy with a
camera: the goal, which no picture shows, is fixed; the block lies anywhere in a square; the camera points to
where the arm works; shadows, which take most of a picture's time on a CPU, are off.
"""

import os
import platform
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import lerobot_env_so101  # noqa: F401 (registers the plugin's environments)
import mujoco
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

TASK = "put the block at the goal"
FPS = 10
MAX_STEPS = 120
ACTION_SCALE = 0.025  # metres per unit of an action; the plugin's default, 1.0, crosses the table in a step
# Middle of the block, (x, y) in metres: in sight of the camera, 9 cm or more from the goal at (0.20, 0.08),
# and where the gripper can be held vertical.
BLOCK_XY = np.array([[0.21, -0.07], [0.27, -0.01]])
# In the plugin's picture, 45 degrees high, the block is 9 of 128 pixels wide, and its square 12. From the
# same place, turned down and narrowed, hand, block and goal are twice as large. Metres, degrees.
CAMERA_TARGET, CAMERA_FOVY = np.array([0.2, 0.0, 0.05]), 24.0


class SO101Place(gymnasium.Wrapper):
    """Observations `{"pixels": {"front": (128, 128, 3)}, "agent_pos": (14,)}`, actions [dx, dy, dz, grasp].
    LeRobot's scripts look for the instruction in `task_description`, for success in `info["is_success"]`.

    Args:
        kwargs: of the plugin's environment.

    Raises:
        RuntimeError: MuJoCo would draw in a window, and there is no display.
    """

    task_description = TASK

    def __init__(self, **kwargs: Any) -> None:
        _check_rendering()
        super().__init__(
            gymnasium.make("lerobot_env_so101/SO101PickPlace-v0", action_scale=ACTION_SCALE, **kwargs)
        )
        model = self.unwrapped.model
        _aim(model)
        model.light_castshadow[:] = 0
        model.vis.quality.offsamples = 0
        image = gymnasium.spaces.Box(0, 255, (128, 128, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            pixels=gymnasium.spaces.Dict(front=image), agent_pos=self.env.observation_space["agent_pos"]
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        observation, info = self.env.reset(seed=seed, options=options)
        data = self.unwrapped.data
        data.jnt("block").qpos[:2] = self.unwrapped.np_random.uniform(*BLOCK_XY)
        mujoco.mj_forward(self.unwrapped.model, data)
        return self._observation(observation), {**info, "is_success": False}

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        # The plugin does not hold actions to its action space.
        action = np.clip(action, self.action_space.low, self.action_space.high)
        observation, reward, terminated, truncated, info = self.env.step(action)
        return (
            self._observation(observation),
            reward,
            terminated,
            truncated,
            {**info, "is_success": info["succeed"]},
        )

    def _observation(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"pixels": {"front": self.env.render()}, "agent_pos": observation["agent_pos"]}


def _aim(model: mujoco.MjModel) -> None:
    """Points the only camera at CAMERA_TARGET."""
    back = model.cam_pos[0] - CAMERA_TARGET
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(back, right), back], axis=1)  # the camera looks along -z
    mujoco.mju_mat2Quat(model.cam_quat[0], axes.flatten())
    model.cam_fovy[0] = CAMERA_FOVY


def _check_rendering() -> None:
    """MuJoCo reads MUJOCO_GL when it is first imported, and without it wants a window. Without a display
    the first picture would then end the process, or fail with "Default framebuffer is not complete"."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    windows = mujoco.gl_context.GLContext.__module__ == "mujoco.glfw"
    if platform.system() == "Linux" and windows and not any(map(os.environ.get, displays)):
        raise RuntimeError(
            "MuJoCo was imported without MUJOCO_GL, and there is no display to draw on: set MUJOCO_GL=osmesa "
            "(or egl) before Python starts, or before the first import of mujoco."
        )


gymnasium.register("so101_sim/SO101Place-v0", SO101Place, max_episode_steps=MAX_STEPS)


@EnvConfig.register_subclass("so101_place")
@dataclass
class SO101PlaceConfig(EnvConfig):
    """The environment above, for LeRobot."""

    task: str = "SO101Place-v0"
    fps: int = FPS
    # Steps after which an episode has failed; the plugin's controller needs about 50.
    episode_length: int = MAX_STEPS
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "pixels/front": PolicyFeature(FeatureType.VISUAL, (128, 128, 3)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (14,)),
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "pixels/front": "observation.images.front",
            "agent_pos": "observation.state",
            "action": "action",
        }
    )

    @property
    def package_name(self) -> str:
        return "so101_sim"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"max_episode_steps": self.episode_length}
