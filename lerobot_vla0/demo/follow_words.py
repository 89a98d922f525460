"""Does a policy do what it is told, or what the scene suggests? `python -m lerobot_vla0.demo.follow_words
--policy.path=<checkpoint> --out=<folder>` gives it the other instructions that the scene of each task allows;
an episode ends as soon as the goal of any of them is in place. Where none is until the step limit, the first
object grasped tells what the policy went for.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..agent import Agent
from ..files import check_place, new_folder
from ..libero.assets import asset_name, is_primitive, prepare_libero
from ..libero.env import LiberoEnv, cameras_of
from ..libero.instructions import goals_in_scene
from ..libero.report import wilson
from ..libero.results import describe_policy
from ..libero.suites import TASKS, check_init_states, check_task_ids
from ..options import PolicyOptions, parse_options
from ..workers import map_in_order
from .record import check_image_size, switch_environment

# Whose goal was in place first, or whose object was grasped first: that of the instruction given, of the
# scene's own task, of another instruction, or none until the step limit. BEFORE: the goal asked for was in
# place before the first step.
ASKED, OWN, ANOTHER, NONE, BEFORE = "asked", "own", "another", "none", "before"
# An episode: task_id, init_state, instruction, own (whether that is the scene's), reached, grasped.
Row = dict[str, Any]


@dataclass(kw_only=True)
class FollowConfig(PolicyOptions):
    """Which policy, in which scenes. `--policy.path=` names the checkpoint; its fields can be overridden
    (`--policy.device=cpu`)."""

    # New folder of the results: words.json and words.md.
    out: Path
    # LIBERO suite. In libero_object a scene has six objects to pick up, in libero_goal all ten tasks.
    suite: str = "libero_object"
    # Task ids of the suite, whose scenes are used; None takes all.
    tasks: list[int] | None = None
    # Episodes per scene and instruction; episode i starts from stored initial state first_init_state + i.
    episodes: int = 2
    # The first stored initial state (0..49).
    first_init_state: int = 0
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Side of the camera images in pixels; as in the data that the policy was trained on.
    image_size: int = 256
    # Processes that play episodes, each with the policy; 1 plays in this one.
    workers: int = 1


def follow_words(config: FollowConfig) -> Path:
    """Plays the episodes, prints and writes the result, and returns its folder.

    Raises:
        ValueError: no policy, a setting out of range, or a suite whose scenes allow one instruction only.
        FileExistsError: `out` exists and is not empty.
    """
    global _agent
    policy = config.require_policy("which policy?")
    check_task_ids(config.suite, config.tasks)
    check_image_size(config.image_size)
    check_init_states(config.episodes, config.first_init_state)
    if config.workers < 1:
        raise ValueError(f"workers={config.workers} must be at least 1.")
    check_place(config.out, "new folder")
    assets = prepare_libero(config.suite, config.assets)
    config.assets = str(assets)  # found, or downloaded, once: the workers get the folder
    policy.stream = False  # of use only where somebody waits for the first action of a chunk
    jobs = jobs_of(config)
    if not any(not own for _, _, own, _ in jobs):
        raise ValueError(
            f"suite={config.suite!r}, tasks={config.tasks}: these scenes allow no instruction but their own. "
            "Take libero_object or libero_goal."
        )
    _agent = None  # that of an earlier call
    played = map_in_order(partial(play_job, config), jobs, config.workers)
    rows = list(tqdm(played, desc="Playing", unit="episode", total=len(jobs)))
    settings = describe_policy(policy) | {
        "suite": config.suite, "tasks": config.tasks, "episodes": config.episodes,
        "first_init_state": config.first_init_state, "image_size": config.image_size,
        "assets": asset_name(assets), "stand_in_assets": is_primitive(assets),
    }  # fmt: skip
    report = report_of(rows, config.suite, is_primitive(assets))
    content = {"settings": settings, "summary": summary_of(rows), "episodes": rows}
    with new_folder(config.out) as folder:
        (folder / "words.json").write_text(json.dumps(content, indent=2))
        (folder / "words.md").write_text(report)
    print(f"{report}\nWrote {config.out}")
    return Path(config.out)


def jobs_of(config: FollowConfig) -> list[tuple[int, str, bool, int]]:
    """(task, instruction, whether it is the scene's own, initial state) of each episode."""
    states = range(config.first_init_state, config.first_init_state + config.episodes)
    return [
        (task, instruction, number == 0, state)
        for task in config.tasks or range(len(TASKS[config.suite]))
        for number, instruction in enumerate(goals_in_scene(config.suite, task))
        for state in states
    ]


_agent: Agent | None = None  # of this process, loaded once


def load_agent(config: FollowConfig) -> Agent:
    """The policy, for one of the worker processes."""
    if config.workers > 1:  # with as many threads each as there are cores, they get into each other's way
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    return Agent.from_config(config.policy)


def play_job(config: FollowConfig, task: int, instruction: str, own: bool, init_state: int) -> Row:
    """Plays one of `jobs_of`, in whichever process."""
    global _agent
    _agent = _agent or load_agent(config)
    settings = {
        "image_size": config.image_size,
        "cameras": cameras_of(config.policy),
        "assets": config.assets,
    }
    env = switch_environment(config.suite, task, **settings)
    row = {"task_id": task, "init_state": init_state, "instruction": instruction, "own": own}
    return row | play_episode(env, _agent, instruction, init_state)


def play_episode(env: LiberoEnv, agent: Agent, instruction: str, init_state: int) -> dict[str, str]:
    """`reached`, whose goal is in place first, after any step, that was not before; and `grasped`, whose
    object both fingers touch first. With the scene's own instruction, a success is "asked"."""
    observation, _ = env.reset(options={"init_state": init_state, "instruction": instruction})
    before = set(env.reached())
    if instruction in before:
        return {"reached": BEFORE, "grasped": NONE}
    own = next(iter(goals_in_scene(env.suite, env.task_id)))
    held: list[str] = []

    def whose(goals: list[str]) -> str:
        return ASKED if instruction in goals else OWN if own in goals else ANOTHER if goals else NONE

    def reached() -> list[str]:
        if not held:
            held.extend(env.held())
        return [goal for goal in env.reached() if goal not in before]

    memory, truncated, goals = agent.policy.decoder.new_episodes(1), False, []
    while not (goals or truncated):
        batch = {"pixels": {key: image[None] for key, image in observation["pixels"].items()}}
        batch["agent_pos"] = observation["agent_pos"][None]
        chunk = agent.act_chunk(batch, [instruction], memory)[0]
        observation, _, _, truncated, _ = env.step_chunk(chunk, until=reached)
        goals = reached()
    return {"reached": whose(goals), "grasped": whose(held)}


def went_for(row: Row) -> str:
    """The goal that was in place first, or, where none was, the object grasped first."""
    return row["grasped"] if row["reached"] == NONE else row["reached"]


def summary_of(rows: list[Row]) -> dict[str, Any]:
    """How often the policy goes for what it is told, in the scenes (task and initial state) that it solves
    with their own instruction: elsewhere it may understand and fail. `share` and `interval` (95 %, Wilson)
    are None if there is no such scene."""
    solved = {(row["task_id"], row["init_state"]) for row in rows if row["own"] and row["reached"] == ASKED}
    others = [row for row in rows if not row["own"] and row["reached"] != BEFORE]
    counted = [row for row in others if (row["task_id"], row["init_state"]) in solved]
    asked = sum(went_for(row) == ASKED for row in counted)
    return {
        "scenes": sum(row["own"] for row in rows),
        "scenes_solved": len(solved),
        "reached": Counter(row["reached"] for row in others),
        "went_for": Counter(map(went_for, others)),
        "asked": asked,
        "asked_and_reached": sum(row["reached"] == ASKED for row in counted),
        "of": len(counted),
        "share": asked / len(counted) if counted else None,
        "interval": wilson(asked, len(counted)) if counted else None,
    }


def report_of(rows: list[Row], suite: str, stand_ins: bool) -> str:
    """The result as Markdown: a table with a line per task's scene, and the share."""
    lines = [f"# Does it follow the words? {suite}", ""]
    if stand_ins:
        lines += ["**Run on stand-in assets: these are not LIBERO scores.**", ""]
    lines += [
        "Of the episodes with another instruction: whose goal was in place first, or, if none was, whose "
        "object was grasped first.",
        "",
        "| scene of task | own instruction: solved | goal: asked | own | another "
        "| only grasped: asked | own | another | neither |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tasks = {row["task_id"]: row["instruction"] for row in rows if row["own"]}
    for task in (*tasks, None):
        mine = [row for row in rows if task in (row["task_id"], None)]
        own = [row["reached"] for row in mine if row["own"]]
        others = [row for row in mine if not row["own"]]
        goals = Counter(row["reached"] for row in others)
        grasps = Counter(row["grasped"] for row in others if row["reached"] == NONE)
        scene = "**all**" if task is None else f"{task}: {tasks[task]}"
        cells = [scene, f"{own.count(ASKED)}/{len(own)}"]
        cells += [str(counts[whose]) for counts in (goals, grasps) for whose in (ASKED, OWN, ANOTHER)]
        lines.append(f"| {' | '.join([*cells, str(grasps[NONE])])} |")
    summary = summary_of(rows)
    solved = f"{summary['scenes_solved']} of {summary['scenes']} scenes (task and initial state)"
    lines += ["", f"It solves {solved} with their own instruction."]
    if summary["of"]:
        low, high = (100 * limit for limit in summary["interval"])
        lines[-1] += (
            f" There, with another one, it goes for what it is asked in {summary['asked']}/{summary['of']} = "
            f"{100 * summary['share']:.1f} % of the episodes (95 % interval {low:.1f}–{high:.1f} %) and gets "
            f"it done in {summary['asked_and_reached']}."
        )
    before = sum(row["reached"] == BEFORE for row in rows)
    if before:
        lines += ["", f"Not counted: {before} episodes whose goal was in place before the first step."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    follow_words(parse_options(FollowConfig, "follow_words", sys.argv[1:]))
