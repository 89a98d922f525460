"""`lerobot-vla0 eval`: the paper's LIBERO evaluation, resumable, in shards, with a report.

50 episodes per task, episode i from stored initial state i, 256×256 images, the suite's step limit, simulator
seed 7 (arXiv 2510.13054, section 4.1; its evaluation code).
"""

import math
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..agent import Agent
from ..options import PolicyOptions
from ..processor_vla0 import load_processors
from .assets import asset_name, is_primitive, prepare_libero
from .config import VLA0LiberoEnv
from .env import cameras_of, check_settings
from .pool import EnvironmentPool, Job, Result
from .report import compare, read_episodes, write_report
from .results import check_folder, describe_policy, save_episode
from .suites import MAX_STEPS, TASKS, check_init_states, check_task_ids, split_suites


@dataclass(kw_only=True)
class EvalConfig(PolicyOptions):
    """What to evaluate. `--policy.path=` names the checkpoint; its fields can be overridden
    (`--policy.device=cpu`)."""

    # Folder of the results. If it exists, the evaluation goes on where it stopped.
    out: Path
    # Suites, separated by commas.
    suites: str = "libero_spatial,libero_object,libero_goal,libero_10"
    # Task ids; None takes all of each suite.
    tasks: list[int] | None = None
    # Episodes per task; episode i starts from stored initial state first_init_state + i.
    episodes: int = 50
    # The first stored initial state (0..49).
    first_init_state: int = 0
    # Environments, each in a process of its own. All that wait for actions are given them in one batch.
    batch_size: int = 1
    # "3/10" runs the third of ten parts; the same command with another K and the same folder, on any machine,
    # runs another part. None: all, or what is due to this process of torchrun, accelerate launch or srun.
    shard: str | None = None
    # With several processes: seconds until one that neither acts nor ends an episode counts as lost.
    rank_timeout: float = 900.0
    # Videos to make, by playing an episode again with rendering on: of failures, all or none.
    videos: str = "failures"
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Side of the camera images in pixels.
    image_size: int = 256
    # Step limit; None takes the suite's (220, 280, 300, 520, 400).
    max_episode_steps: int | None = None
    # Another results folder to compare with, on the same initial states.
    compare: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        suites = self.suite_list
        if not suites or len(set(suites)) < len(suites):
            raise ValueError(f"suites={self.suites!r} must name at least one suite, and each once.")
        for suite in suites:
            check_task_ids(suite, self.tasks)
        check_settings(self.image_size, self.max_episode_steps)
        given = self.shard is not None
        if given and (not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.shard) or self.part > self.parts):
            raise ValueError(f"shard={self.shard!r} must be K/N with 1 <= K <= N, for example 3/10.")
        if not 0 < self.rank_timeout < math.inf:
            raise ValueError(f"rank_timeout={self.rank_timeout} must be above 0 seconds and finite.")
        if self.videos not in ("failures", "all", "none"):
            raise ValueError(f"videos={self.videos!r} must be failures, all or none.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")
        check_init_states(self.episodes, self.first_init_state)

    @property
    def suite_list(self) -> list[str]:
        return split_suites(self.suites)

    @property
    def part(self) -> int:
        return int((self.shard or "1/1").split("/")[0])

    @property
    def parts(self) -> int:
        return int((self.shard or "1/1").split("/")[1])

    def video_of(self, result: Result) -> Path | None:
        """The video file to make of an episode."""
        if self.videos == "none" or (self.videos == "failures" and result.success):
            return None
        outcome = "success" if result.success else "failure"
        suite, task, episode, _ = result.job
        return Path(self.out) / "videos" / f"{suite}_{task}_episode_{episode}_{outcome}.mp4"

    def jobs(self, part: int, parts: int) -> list[Job]:
        """The episodes of one of `parts` parts, in the order in which they begin. Each part has an equal
        share of every suite, and as few tasks as possible: making the environment of a task takes as long as
        an episode."""
        jobs = []
        for suite in self.suite_list:
            whole = [
                Job(suite, task, episode, self.first_init_state + episode)
                for task in (self.tasks or range(len(TASKS[suite])))
                for episode in range(self.episodes)
            ]
            jobs += whole[len(whole) * (part - 1) // parts : len(whole) * part // parts]
        return jobs


def evaluate(config: EvalConfig) -> Path:
    """Runs the episodes that are not in the results folder yet, writes the report and returns its path, in
    one process (`ranks.evaluate` shares them out). Creates nothing before the first episode has ended.

    Raises:
        ValueError, OSError, RuntimeError: see `run_episodes`.
    """
    run_episodes(config)
    return report(config)


def run_episodes(config: EvalConfig, beat: Callable[[], None] = lambda: None) -> None:
    """Runs the episodes of `config.shard` that are not in the results folder yet.

    Args:
        beat: called when the folder and the settings have been checked, when the policy is loaded, and each
            time that it is asked for actions.

    Raises:
        ValueError: no policy, one whose actions or cameras LIBERO does not have, or a results folder with
            other settings.
        OSError: the results folder cannot be written.
        RuntimeError: an environment failed, or its process died.
    """
    policy, out = config.require_policy("which policy?"), Path(config.out)
    if config.compare is not None and not read_episodes(config.compare):
        raise ValueError(f"compare={str(config.compare)!r} holds no finished episode.")
    folders = [prepare_libero(suite, config.assets) for suite in config.suite_list]
    settings = describe_policy(policy) | {
        "suites": config.suites,
        "tasks": config.tasks,
        "episodes": config.episodes,
        "first_init_state": config.first_init_state,
        "image_size": config.image_size,
        "max_episode_steps": config.max_episode_steps
        or {suite: MAX_STEPS[suite] for suite in config.suite_list},
        "assets": [asset_name(folder) for folder in folders],
        "stand_in_assets": any(is_primitive(folder) for folder in folders),
        "episodes_in_all": len(config.jobs(1, 1)),
    }
    check_folder(out, settings)
    beat()
    done, jobs = read_episodes(out), config.jobs(config.part, config.parts)
    finished = [done[job[:3]] for job in jobs if job[:3] in done]
    left = [job for job in jobs if job[:3] not in done]
    if left:
        agent = _load_agent(config)
        beat()
        pool = EnvironmentPool(
            min(config.batch_size, len(left)),
            image_size=config.image_size,
            cameras=cameras_of(agent.policy.config),
            max_episode_steps=config.max_episode_steps,
            assets=str(folders[0]),  # found, or downloaded, once; the same for all suites
        )

        def begin(job: Job) -> Any:
            return agent.policy.decoder.new_episodes(config.batch_size)[0]

        def act(*looks: Any) -> np.ndarray:
            beat()
            return agent.act_chunk(*looks)

        name = "Evaluating" if config.parts == 1 else f"Evaluating {config.part}/{config.parts}"
        with (
            closing(pool),
            tqdm(total=len(jobs), initial=len(finished), desc=name, unit="episode") as progress,
        ):
            for result in pool.play(left, begin, act, config.video_of):
                finished.append(row_of(result))
                save_episode(out, f"{config.part}/{config.parts}", settings, finished[-1])
                rate = 100 * sum(row["success"] for row in finished) / len(finished)
                progress.update()
                progress.set_postfix(success=f"{rate:.1f} %", task=f"{result.job.suite} {result.job.task_id}")


def report(config: EvalConfig) -> Path:
    """Writes and prints the report of all episodes in the results folder, and returns its path.

    Raises:
        ValueError: there is none.
    """
    file = write_report(Path(config.out))
    print(file.read_text().split("## Settings")[0])
    if config.compare is not None:
        print(compare(config.out, config.compare))
    print(f"Wrote {file}")
    return file


def row_of(result: Result) -> dict[str, Any]:
    """The line of an episode in the results."""
    job = result.job._asdict()
    return {
        "suite": job.pop("suite"), "task_id": job.pop("task_id"), "task": result.task, **job,
        "success": result.success, "steps": result.steps,
    }  # fmt: skip


def _load_agent(config: EvalConfig) -> Agent:
    from lerobot.policies.factory import make_policy

    policy_config = config.policy
    policy_config.stream = False  # of use only where somebody waits for the first action of a chunk
    env_config = VLA0LiberoEnv(
        task=config.suite_list[0], observation_height=config.image_size, observation_width=config.image_size
    )
    policy = make_policy(policy_config, env_cfg=env_config)
    cameras = set(policy.config.camera_keys) - set(env_config.features_map.values())
    if cameras:
        raise ValueError(
            f"the policy looks at {sorted(cameras)}, which LIBERO does not have; it has "
            "observation.images.image and observation.images.image2."
        )
    return Agent(policy, *load_processors(policy_config, policy_config.pretrained_path))
