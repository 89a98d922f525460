"""`--env.type=vla0_libero`: LeRobot's LIBERO environment with the settings of the VLA-0 paper."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.envs.configs import EnvConfig, LiberoEnv
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end

from ..config_types import reasons_shown
from .assets import prepare_libero
from .suites import MAX_STEPS, check_task_ids, split_suites

SIMULATOR_SEED = 7  # of every episode in the original's evaluation


@EnvConfig.register_subclass("vla0_libero")
@dataclass
class VLA0LiberoEnv(LiberoEnv):
    """LIBERO with 256×256 images and the paper's step limits. Never asks questions on first use, and can run
    libero_object without a download.

    Raises:
        ValueError: an unknown suite in `task`, or a task id that one of them lacks.
    """

    # Suite, or several separated by commas.
    task: str = "libero_object"
    observation_height: int = 256
    observation_width: int = 256
    # Seed of the simulator at every reset, whatever seed the script gives; None passes the script's on.
    simulator_seed: int | None = SIMULATOR_SEED
    # "auto": LIBERO's assets, installed or downloaded, else stand-ins for libero_object. "real",
    # "primitive", or a folder.
    assets: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        with reasons_shown():
            for suite in split_suites(self.task) or [self.task]:
                check_task_ids(suite, self.task_ids)

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """{suite: {task id: vector environment of `n_envs` environments}}."""
        envs: dict[str, dict[int, gym.vector.VectorEnv]] = {}
        for suite in split_suites(self.task):
            # Found, or downloaded, once: the environments' processes get the folder.
            assets = str(prepare_libero(suite, self.assets))
            from lerobot.envs.libero import create_libero_envs  # its import reads LIBERO's config file

            envs |= create_libero_envs(
                task=suite,
                n_envs=n_envs,
                camera_name=self.camera_name,
                init_states=self.init_states,
                gym_kwargs=self.gym_kwargs,
                env_cls=partial(
                    _vectorise, config=self, suite=suite, assets=assets, use_async=use_async_envs
                ),
                control_mode=self.control_mode,
                episode_length=self.episode_length or MAX_STEPS[suite],
                camera_name_mapping=self.camera_name_mapping,
                is_libero_plus=self.is_libero_plus,
            )
        return envs


def _vectorise(
    makers: list[Callable[[], Any]], *, config: VLA0LiberoEnv, suite: str, assets: str, use_async: bool
) -> Any:
    makers = [partial(_make_environment, maker, suite, assets, config) for maker in makers]
    if use_async and len(makers) > 1:
        return _LazyAsyncVectorEnv(makers)
    # An environment whose episode ends early stays frozen until all have ended: Gymnasium's automatic reset
    # would take the next initial state.
    return gym.vector.SyncVectorEnv(
        [freeze_after_episode_end(maker) for maker in makers],
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
    )


def _make_environment(
    maker: Callable[[], gym.Env], suite: str, assets: str, config: VLA0LiberoEnv
) -> gym.Env:
    """Runs in the environment's own process, where LIBERO has not been prepared yet."""
    prepare_libero(suite, assets)
    return _PaperProtocol(maker(), config)


class _PaperProtocol(gym.Wrapper):
    """The same simulator seed at every reset, initial states on request, and video frames without rendering
    again."""

    def __init__(self, env: gym.Env, config: VLA0LiberoEnv) -> None:
        super().__init__(env)
        self.simulator_seed, self.frame = config.simulator_seed, None
        # LeRobot's environment says 80, with which videos would run four times too fast.
        self.metadata = {**env.metadata, "render_fps": config.fps}

    def set_init_states(self, init_states: list[int]) -> None:
        """Chooses the initial state of the next episode from a list with one for each environment of the
        vector."""
        self.unwrapped.init_state_id = init_states[self.unwrapped.episode_index]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        seed = seed if self.simulator_seed is None else self.simulator_seed
        observation, info = self.env.reset(seed=seed, options=options)
        self.frame = next(iter(observation["pixels"].values()))
        return observation, info

    def step(self, action: Any) -> tuple[Any, ...]:
        observation, *rest = self.env.step(action)
        self.frame = next(iter(observation["pixels"].values()))
        return observation, *rest

    def render(self) -> Any:
        """The scene camera's last image, upright. LeRobot's environment would render both cameras again."""
        return self.env.render() if self.frame is None else self.frame[::-1, ::-1].copy()
