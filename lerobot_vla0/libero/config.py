"""`--env.type=vla0_libero`: LeRobot's LIBERO environment with the settings of the VLA-0 paper."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
from lerobot.envs.configs import EnvConfig, LiberoEnv
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end

from .assets import prepare_libero

# Step limits of the paper's evaluation; LeRobot's own differ in libero_spatial (280).
MAX_STEPS = {
    "libero_spatial": 220,  # longest training demo has 193 steps
    "libero_object": 280,  # longest training demo has 254 steps
    "libero_goal": 300,  # longest training demo has 270 steps
    "libero_10": 520,  # longest training demo has 505 steps
    "libero_90": 400,  # longest training demo has 373 steps
}
SUITES = tuple(MAX_STEPS)
NUM_TASKS = {suite: 90 if suite == "libero_90" else 10 for suite in SUITES}
NUM_INIT_STATES = 50  # LIBERO stores as many per task
SIMULATOR_SEED = 7  # of every episode in the original's evaluation


def check_task_ids(suite: str, task_ids: list[int] | None) -> None:
    """Raises ValueError, with what there is, for a suite or tasks that LIBERO does not have."""
    if suite not in SUITES:
        raise ValueError(f"unknown LIBERO suite {suite!r}. Known: {', '.join(SUITES)}.")
    unknown = [task for task in task_ids or [] if not 0 <= task < NUM_TASKS[suite]]
    if unknown:
        raise ValueError(f"{suite} has the tasks 0..{NUM_TASKS[suite] - 1}, not {unknown}.")


@EnvConfig.register_subclass("vla0_libero")
@dataclass
class VLA0LiberoEnv(LiberoEnv):
    """LIBERO at 256×256 with the paper's step limits, which never asks questions and can run without a
    download.

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
        for suite in self.suites or [self.task]:
            check_task_ids(suite, self.task_ids)

    @property
    def suites(self) -> list[str]:
        return [suite.strip() for suite in self.task.split(",") if suite.strip()]

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """{suite: {task id: vector environment of `n_envs` environments}}."""
        envs: dict[str, dict[int, gym.vector.VectorEnv]] = {}
        for suite in self.suites:
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
    makers = [partial(_make, maker, suite, assets, config) for maker in makers]
    if use_async and len(makers) > 1:
        return _LazyAsyncVectorEnv(makers)
    # An environment that ends early waits for the others: its automatic reset would use up an init state.
    return gym.vector.SyncVectorEnv(
        [freeze_after_episode_end(maker) for maker in makers],
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
    )


def _make(maker: Callable[[], gym.Env], suite: str, assets: str, config: VLA0LiberoEnv) -> gym.Env:
    """Runs in the worker process, which knows nothing of what its parent prepared."""
    prepare_libero(suite, assets)
    return _PaperProtocol(maker(), config)


class _PaperProtocol(gym.Wrapper):
    """One seed at every reset, initial states on request, and pictures for videos that cost nothing."""

    def __init__(self, env: gym.Env, config: VLA0LiberoEnv) -> None:
        super().__init__(env)
        self.seed, self.frame = config.simulator_seed, None
        # LeRobot's says 80: videos would run four times too fast.
        self.metadata = {**env.metadata, "render_fps": config.fps}

    def set_init_states(self, init_states: list[int]) -> None:
        """Initial states of the next episode, one per environment of the vector; takes its own."""
        self.unwrapped.init_state_id = init_states[self.unwrapped.episode_index]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        observation, info = self.env.reset(seed=seed if self.seed is None else self.seed, options=options)
        self.frame = next(iter(observation["pixels"].values()))
        return observation, info

    def step(self, action: Any) -> tuple[Any, ...]:
        observation, *rest = self.env.step(action)
        self.frame = next(iter(observation["pixels"].values()))
        return observation, *rest

    def render(self) -> Any:
        """The last observation of the scene camera, upright; LeRobot's would render both cameras again."""
        return self.env.render() if self.frame is None else self.frame[::-1, ::-1].copy()
