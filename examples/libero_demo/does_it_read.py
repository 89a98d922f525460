"""Does a policy do what it is told, or what the scene suggests?

python examples/libero_demo/does_it_read.py --policy.path=<checkpoint> --out=outputs/words --workers=2

Gives the policy the other instructions that the scene of each task allows. An episode ends as soon as the
goal of any instruction is reached; if none is until the step limit, the object that was grasped first counts.
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
from instructions import goals_in_scene, grasped, options_of, reached
from record import map_in_order, switch_environment
from tqdm import tqdm

from lerobot_vla0.agent import Agent
from lerobot_vla0.cli import PolicyOptions, parse_options
from lerobot_vla0.decoding.decoder import Plan
from lerobot_vla0.files import new_folder
from lerobot_vla0.libero.assets import is_primitive, prepare_libero
from lerobot_vla0.libero.env import LiberoEnv, cameras_of
from lerobot_vla0.libero.report import wilson
from lerobot_vla0.libero.suites import TASKS, check_init_states, check_task_ids

# Whose goal was reached first, or whose object was grasped first: that of the given instruction, of the
# scene's own task, of another instruction, or none. BEFORE: the goal held at the episode's start.
ASKED, OWN, ANOTHER, NONE, BEFORE = "asked", "own", "another", "none", "before"
# An episode: task_id, init_state, instruction, own (is the instruction the scene's?), reached, grasped.
Row = dict[str, Any]


@dataclass(kw_only=True)
class ReadConfig(PolicyOptions):
    """Which policy, in which scenes. `--policy.path=` names the checkpoint."""

    # New folder of the results: words.json and words.md.
    out: Path
    # LIBERO suite. In libero_object a scene has six objects to pick up, in libero_goal all ten tasks.
    suite: str = "libero_object"
    # Task ids of the suite; None: all.
    tasks: list[int] | None = None
    # Episodes per scene and instruction; episode i starts from stored initial state first_init_state + i.
    episodes: int = 2
    first_init_state: int = 0
    # LIBERO's assets: auto, real, primitive, or a folder.
    assets: str = "auto"
    # Side of the camera images in pixels, as in the data that the policy was trained on.
    image_size: int = 256
    # Processes that play episodes, each with the policy; 1: none but this one.
    workers: int = 1


def does_it_read(config: ReadConfig) -> None:
    """Plays the episodes, prints and writes the result.

    Raises:
        ValueError: no policy, an unknown suite, task or initial state, or scenes with one instruction only.
        FileExistsError: `out` exists and is not empty.
    """
    config.require_policy("which policy?")
    check_task_ids(config.suite, config.tasks)
    check_init_states(config.episodes, config.first_init_state)
    # Downloads happen here, once: worker processes get the folder.
    config.assets = str(prepare_libero(config.suite, config.assets))
    jobs = jobs_of(config)
    if all(own for _, _, own, _ in jobs):
        raise ValueError(
            f"suite={config.suite!r} has scenes with one instruction only. Take libero_object or libero_goal."
        )
    results = map_in_order(partial(play_job, config), jobs, config.workers)
    with new_folder(config.out) as folder:
        rows = list(tqdm(results, desc="Playing", unit="episode", total=len(jobs)))
        options = {name: value for name, value in vars(config).items() if name != "policy"}
        settings = {"policy_path": config.policy.pretrained_path, **options}
        content = {"settings": settings, "summary": summary_of(rows), "episodes": rows}
        report = report_of(rows, config.suite, is_primitive(Path(config.assets)))
        (folder / "words.json").write_text(json.dumps(content, indent=2, default=str))
        (folder / "words.md").write_text(report)
    print(f"{report}\nWrote {config.out}")


def jobs_of(config: ReadConfig) -> list[tuple[int, str, bool, int]]:
    """(task, instruction, whether it is the scene's own, initial state) of each episode."""
    states = range(config.first_init_state, config.first_init_state + config.episodes)
    return [
        (task, instruction, number == 0, state)
        for task in config.tasks or range(len(TASKS[config.suite]))
        for number, instruction in enumerate(goals_in_scene(config.suite, task))
        for state in states
    ]


_agent: Agent | None = None  # of this process, loaded once


def play_job(config: ReadConfig, task: int, instruction: str, own: bool, init_state: int) -> Row:
    """Plays one of `jobs_of`, in any process."""
    global _agent
    if _agent is None:
        if config.workers > 1:  # a thread per core in each process: they would wait for each other
            torch.set_num_threads(max(1, os.cpu_count() // config.workers))
        _agent = Agent.from_config(config.policy)
    settings = {"image_size": config.image_size, "cameras": cameras_of(config.policy)}
    env = switch_environment(config.suite, task, assets=config.assets, **settings)
    row = {"task_id": task, "init_state": init_state, "instruction": instruction, "own": own}
    return row | play_episode(env, _agent, instruction, init_state)


def play_episode(env: LiberoEnv, agent: Agent, instruction: str, init_state: int) -> dict[str, str]:
    """`reached`: whose goal holds first, after any step, that did not hold at the start; and `grasped`: whose
    object both fingers touch first. With the scene's own instruction, a success is "asked"."""
    observation, _ = env.reset(options={"init_state": init_state, **options_of(env, instruction)})
    before = set(reached(env))
    if instruction in before:
        return {"reached": BEFORE, "grasped": NONE}
    own = next(iter(goals_in_scene(env.suite, env.task_id)))
    first_grasp: list[str] = []

    def whose(goals: list[str]) -> str:
        return ASKED if instruction in goals else OWN if own in goals else ANOTHER if goals else NONE

    def new_goals() -> list[str]:
        if not first_grasp:
            first_grasp.extend(grasped(env))
        return [goal for goal in reached(env) if goal not in before]

    plans, truncated, goals = [Plan()], False, []
    while not (goals or truncated):
        batch = {"pixels": {key: image[None] for key, image in observation["pixels"].items()}}
        batch["agent_pos"] = observation["agent_pos"][None]
        chunk = agent.act_chunk(batch, [instruction], plans)[0]
        observation, _, _, truncated, _ = env.step_chunk(chunk, until=new_goals)
        goals = new_goals()
    return {"reached": whose(goals), "grasped": whose(first_grasp)}


def went_for(row: Row) -> str:
    """Whose goal was reached first, or, if none was, whose object was grasped first."""
    return row["grasped"] if row["reached"] == NONE else row["reached"]


def summary_of(rows: list[Row]) -> dict[str, Any]:
    """How often the policy goes for what it is told, in the scenes (task and initial state) that it solves
    with their own instruction: elsewhere it may understand and fail. `interval`: 95 %, Wilson, or None."""
    solved = {(row["task_id"], row["init_state"]) for row in rows if row["own"] and row["reached"] == ASKED}
    others = [row for row in rows if not row["own"] and row["reached"] != BEFORE]
    counted = [row for row in others if (row["task_id"], row["init_state"]) in solved]
    asked = sum(went_for(row) == ASKED for row in counted)
    return {
        "scenes": sum(row["own"] for row in rows),
        "scenes_solved": len(solved),
        "asked": asked,
        "asked_and_reached": sum(row["reached"] == ASKED for row in counted),
        "of": len(counted),
        "interval": wilson(asked, len(counted)) if counted else None,
    }


def report_of(rows: list[Row], suite: str, stand_ins: bool) -> str:
    """The result as Markdown: a table with a line per task's scene, and the share."""
    lines = [f"# Does it read? {suite}", ""]
    if stand_ins:
        lines += ["**Run on stand-in assets: these are not LIBERO scores.**", ""]
    lines += [
        "Of the episodes with another instruction: whose goal was reached first, or, if none was, whose "
        "object was grasped first.",
        "",
        "| scene of task | own instruction: solved | goal: asked | own | another "
        "| only grasped: asked | own | another | neither |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task_id"] for row in rows):
        scene = [row for row in rows if row["task_id"] == task]
        lines.append(table_row(f"{task}: {scene[0]['instruction']}", scene))
    lines.append(table_row("**all**", rows))
    summary = summary_of(rows)
    lines += [
        "",
        f"It solves {summary['scenes_solved']} of {summary['scenes']} scenes (task and initial state).",
    ]
    if summary["of"]:
        low, high = (100 * limit for limit in summary["interval"])
        lines[-1] += (
            f" There, with another instruction, it goes for what it is asked in {summary['asked']}/"
            f"{summary['of']} episodes (95 % interval {low:.1f}–{high:.1f} %) and gets it done in "
            f"{summary['asked_and_reached']}."
        )
    return "\n".join([*lines, ""])


def table_row(name: str, rows: list[Row]) -> str:
    own = [row["reached"] for row in rows if row["own"]]
    others = [row for row in rows if not row["own"]]
    goals = Counter(row["reached"] for row in others)
    grasps = Counter(row["grasped"] for row in others if row["reached"] == NONE)
    counts = [
        goals[ASKED],
        goals[OWN],
        goals[ANOTHER],
        grasps[ASKED],
        grasps[OWN],
        grasps[ANOTHER],
        grasps[NONE],
    ]
    return f"| {name} | {own.count(ASKED)}/{len(own)} | {' | '.join(map(str, counts))} |"


if __name__ == "__main__":
    does_it_read(parse_options(ReadConfig, "does_it_read.py", sys.argv[1:]))
