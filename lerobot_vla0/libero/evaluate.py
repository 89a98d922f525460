"""`lerobot-vla0 eval`: the paper's LIBERO evaluation, resumable, in parts, with a report.

50 episodes per task, episode i from stored initial state i, 256×256 images, the suite's step limit, simulator
seed 7 (arXiv 2510.13054, section 4.1; its evaluation code).

Several processes, on one machine or more, share the results folder and nothing else. Each runs its part and
writes the report of the episodes that there are, so that the last one writes the whole.
"""

import os
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..agent import Agent
from ..cli import PolicyOptions
from ..configuration_vla0 import VLA0Config
from ..decoding.decoder import Plan
from .assets import asset_name, is_primitive, prepare_libero
from .env import CAMERAS, cameras_of, check_settings
from .pool import EnvironmentPool, Job, Result
from .report import check_folder, compare, describe_policy, read_episodes, save_episode, write_report
from .suites import MAX_STEPS, TASKS, check_init_states, check_task_ids, split_suites

# Variables of a process's number, of the number of processes, and of its number on its machine: torchrun's
# and accelerate's; srun's. SLURM_NTASKS and SLURM_PROCID are also set in a batch script that runs once.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


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
    # Environments, each in a process of its own. The policy acts for all that wait for actions in one batch.
    batch_size: int = 1
    # "3/10" runs the third of ten parts; the same command with another K and the same folder, on any machine,
    # runs another part. None: all, or the part of this process of torchrun, accelerate launch or srun.
    shard: str | None = None
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
        check_init_states(self.episodes, self.first_init_state)
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.shard or "1/1") or self.part[0] > self.part[1]:
            raise ValueError(f"shard={self.shard!r} must be K/N with 1 <= K <= N, for example 3/10.")
        if self.videos not in ("failures", "all", "none"):
            raise ValueError(f"videos={self.videos!r} must be failures, all or none.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")

    @property
    def suite_list(self) -> list[str]:
        return split_suites(self.suites)

    @property
    def part(self) -> tuple[int, int]:
        """(K, N): this is part K of N."""
        part, parts = (self.shard or "1/1").split("/")
        return int(part), int(parts)

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


def main(config: EvalConfig) -> Path | None:
    """`lerobot-vla0 eval`: `evaluate`, or one part of it in a process of a launcher, on its GPU."""
    number, count, local = find_rank(os.environ)
    if count > 1:
        if config.shard is not None:
            raise ValueError(f"shard={config.shard!r}: leave it out, each of {count} processes takes a part.")
        config.shard = f"{number + 1}/{count}"
        policy, gpus = config.require_policy("which policy?"), torch.cuda.device_count()
        # In turn; not where the launcher shows each process only its own GPU, or the user names one.
        if policy.device == "cuda" and local is not None and gpus > 1:
            policy.device = f"cuda:{local % gpus}"
    return evaluate(config)


def find_rank(environ: Mapping[str, str]) -> tuple[int, int, int | None]:
    """A process's number, the number of processes, and its number on its machine (None if unknown), from the
    variables of a launcher; (0, 1, None) if there are none. torchrun's go before Slurm's: `srun torchrun ...`
    starts several processes in each task."""
    for number, count, local in LAUNCHERS:
        if count in environ:  # Slurm sets the number alone in batch scripts
            on_machine = int(environ[local]) if local in environ else None
            return int(environ[number]), int(environ[count]), on_machine
    return 0, 1, None


def evaluate(config: EvalConfig) -> Path | None:
    """Runs the episodes of `config.shard` that are not in the results folder yet, in this process, and writes
    the report; returns its path, or None if there is no episode yet. Creates nothing before the first episode
    has ended.

    Raises:
        ValueError: no policy, one whose actions or cameras LIBERO does not have, or a results folder of other
            settings.
        OSError: the results folder cannot be written.
        RuntimeError: an environment failed, or its process died.
    """
    policy = config.require_policy("which policy?")
    _check_policy(policy)
    if config.compare is not None and not read_episodes(config.compare):
        raise ValueError(f"compare={str(config.compare)!r} holds no finished episode.")
    folders = [prepare_libero(suite, config.assets) for suite in config.suite_list]
    protocol = ("suites", "tasks", "episodes", "first_init_state", "image_size")
    limits = {suite: MAX_STEPS[suite] for suite in config.suite_list}
    settings = describe_policy(policy) | {name: getattr(config, name) for name in protocol}
    settings |= {
        "max_episode_steps": config.max_episode_steps or limits,
        "assets": [asset_name(folder) for folder in folders],
        "stand_in_assets": any(is_primitive(folder) for folder in folders),
        "episodes_in_all": len(config.jobs(1, 1)),
    }
    check_folder(Path(config.out), settings)
    _run_episodes(config, settings, str(folders[0]))  # the folder is the same for all suites
    return _report(config)


def _check_policy(policy: VLA0Config) -> None:
    actions, unknown = policy.action_feature.shape, set(cameras_of(policy)) - set(CAMERAS)
    if actions != (7,):
        raise ValueError(f"the policy's actions have {actions[0]} dimensions, LIBERO's have 7.")
    if unknown:
        raise ValueError(f"the policy needs the cameras {sorted(unknown)}; LIBERO has {list(CAMERAS)}.")


def _run_episodes(config: EvalConfig, settings: dict[str, Any], assets: str) -> None:
    out, jobs = Path(config.out), config.jobs(*config.part)
    done = read_episodes(out)
    left = [job for job in jobs if job[:3] not in done]
    if not left:
        return
    agent = Agent.from_config(config.policy)
    environment = {"image_size": config.image_size, "cameras": cameras_of(agent.policy.config)}
    environment |= {"assets": assets, "max_episode_steps": config.max_episode_steps}
    pool = EnvironmentPool(min(config.batch_size, len(left)), **environment)
    part = "{}/{}".format(*config.part)
    successes = [done[job[:3]]["success"] for job in jobs if job[:3] in done]
    bar = tqdm(total=len(jobs), initial=len(successes), desc=f"Evaluating {part}", unit="episode")
    with closing(pool), bar:
        for result in pool.play(left, lambda job: Plan(), agent.act_chunk, config.video_of):
            suite, task_id, episode, init_state = result.job
            row = {"suite": suite, "task_id": task_id, "task": result.task, "episode": episode}
            row |= {"init_state": init_state, "success": result.success, "steps": result.steps}
            save_episode(out, part, settings, row)
            successes.append(result.success)
            bar.update()
            rate = 100 * sum(successes) / len(successes)
            bar.set_postfix(success=f"{rate:.1f} %", task=f"{suite} {task_id}")


def _report(config: EvalConfig) -> Path | None:
    """Writes and prints the report of all episodes in the results folder."""
    out, episodes, file = Path(config.out), {}, None
    # Again if other processes have ended episodes meanwhile: this report may have replaced a newer one.
    while len(done := read_episodes(out)) > len(episodes):
        episodes, missing, parts = done, {}, config.part[1]
        for part in range(1, parts + 1):
            missing[f"{part}/{parts}"] = sum(job[:3] not in done for job in config.jobs(part, parts))
        file = write_report(out, {part: count for part, count in missing.items() if count})
    if file is not None:
        print(file.read_text().split("## Settings")[0])
        if config.compare is not None:
            print(compare(out, config.compare))
        print(f"Wrote {file}")
    return file
