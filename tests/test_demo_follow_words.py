import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lerobot_vla0
from lerobot_vla0.demo import follow_words as module
from lerobot_vla0.demo.follow_words import (
    ANOTHER,
    ASKED,
    BEFORE,
    NONE,
    OWN,
    FollowConfig,
    follow_words,
    jobs_of,
    play_episode,
    report_of,
    summary_of,
    went_for,
)
from lerobot_vla0.libero.report import wilson

MILK = "pick up the milk and place it in the basket"  # task 7
BUTTER = "pick up the butter and place it in the basket"  # another of the objects in its scene


def row(task: int, state: int, reached: str, grasped: str = NONE, own: bool = False) -> dict:
    name = f"own {task}" if own else "other"
    known = {"task_id": task, "init_state": state, "instruction": name, "own": own}
    return known | {"reached": reached, "grasped": grasped}


ROWS = [
    # What is in place counts more than what was grasped before.
    *(
        row(0, 0, ASKED, ASKED, own=True),
        row(0, 0, ASKED, OWN),
        row(0, 0, OWN, ASKED),
        row(0, 0, NONE, ASKED),
    ),
    row(0, 0, BEFORE),
    # Not solved with its own instruction: left out of the share.
    *(row(0, 1, NONE, ASKED, own=True), row(0, 1, ASKED, ASKED), row(0, 1, NONE, ANOTHER), row(0, 1, NONE)),
    *(row(3, 0, ASKED, own=True), row(3, 0, ANOTHER, ANOTHER), row(3, 0, NONE, OWN), row(3, 0, ASKED, ASKED)),
]


def test_summary():
    """3 of the 6 episodes in the two scenes that are solved with their own instruction."""
    assert summary_of(ROWS) == {
        "scenes": 3,
        "scenes_solved": 2,
        "reached": {ASKED: 3, OWN: 1, ANOTHER: 1, NONE: 4},
        "went_for": {ASKED: 4, OWN: 2, ANOTHER: 2, NONE: 1},
        "asked": 3,
        "asked_and_reached": 2,
        "of": 6,
        "share": 0.5,
        "interval": wilson(3, 6),
    }
    nothing = summary_of([row(0, 0, NONE, own=True), row(0, 0, ASKED)])
    assert (nothing["asked"], nothing["of"], nothing["share"], nothing["interval"]) == (0, 0, None, None)


def test_report():
    lines = report_of(ROWS, "libero_object", stand_ins=True).splitlines()
    assert [line for line in lines if line.startswith("| 0") or line.startswith(("| 3", "| **"))] == [
        "| 0: own 0 | 1/2 | 2 | 1 | 0 | 1 | 0 | 1 | 1 |",
        "| 3: own 3 | 1/1 | 1 | 0 | 1 | 0 | 1 | 0 | 0 |",
        "| **all** | 2/3 | 3 | 1 | 1 | 1 | 1 | 1 | 1 |",
    ]
    text = "\n".join(lines)
    assert "solves 2 of 3 scenes (task and initial state) with their own instruction. There" in text
    assert "in 3/6 = 50.0 % of the episodes (95 % interval 18.8–81.2 %) and gets it done in 2." in text
    assert "Not counted: 1 episodes" in text and "not LIBERO scores" in text
    text = report_of([row(0, 0, NONE, own=True), row(0, 0, ASKED)], "libero_goal", stand_ins=False)
    assert "solves 0 of 1 scenes" in text and "There" not in text and "stand-in" not in text


@pytest.fixture
def config(learnt, tmp_path) -> FollowConfig:
    """For task 7 only, one initial state; the policy's actions lead nowhere."""
    small = {"assets": "primitive", "image_size": 56}
    config = FollowConfig(out=tmp_path / "words", tasks=[7], episodes=1, first_init_state=1, **small)
    config.policy = lerobot_vla0.Agent.from_pretrained(learnt[0], device="cpu").policy.config
    return config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policy": None}, "which policy"),
        ({"suite": "libero_foo"}, "unknown LIBERO suite 'libero_foo'"),
        ({"tasks": [10]}, r"libero_object has the tasks 0..9, not \[10\]"),
        ({"episodes": 0}, "episodes=0, .*: at least 1 episode, and"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"episodes": 20, "first_init_state": 31}, "first_init_state=31: .* initial states in 0..49"),
        ({"image_size": 16}, "image_size=16 must be in 32..2048"),
    ],
)
def test_bad_settings(config, overrides, message):
    for name, value in overrides.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        follow_words(config)
    assert not config.out.exists()


def test_suite_without_other_instructions(config, monkeypatch):
    monkeypatch.setattr(module, "prepare_libero", lambda suite, assets: Path(assets))
    monkeypatch.setattr(module, "goals_in_scene", lambda suite, task: {"own": []})
    config.suite = "libero_spatial"
    with pytest.raises(ValueError, match="suite='libero_spatial', .* no instruction but their own"):
        follow_words(config)


def test_jobs(config, monkeypatch):
    monkeypatch.setattr(module, "goals_in_scene", lambda suite, task: dict.fromkeys((f"own {task}", "b")))
    config.tasks, config.episodes = [2, 4], 2
    assert jobs_of(config) == [
        (2, "own 2", True, 1), (2, "own 2", True, 2), (2, "b", False, 1), (2, "b", False, 2),
        (4, "own 4", True, 1), (4, "own 4", True, 2), (4, "b", False, 1), (4, "b", False, 2),
    ]  # fmt: skip
    config.tasks = None
    assert len(jobs_of(config)) == 10 * 2 * 2


def test_goal_in_place_before_the_first_step():
    env = SimpleNamespace(reset=lambda options: ({}, {}), reached=lambda: ["b"])
    assert play_episode(env, None, "b", 0) == {"reached": BEFORE, "grasped": NONE}


class Scripted:
    """In place of an agent: the expert, which follows the words or always picks up one object."""

    def __init__(self, env, always: str | None = None) -> None:
        self.env, self.always = env, always
        self.policy = SimpleNamespace(decoder=SimpleNamespace(new_episodes=lambda number: [None]))
        self.expert = None

    def act_chunk(self, observation, tasks, memory) -> np.ndarray:
        from lerobot_vla0.demo.expert import PickAndPlaceExpert
        from lerobot_vla0.libero.instructions import goal_of

        assert observation["pixels"]["image"].shape[0] == len(observation["agent_pos"]) == len(tasks) == 1
        if self.env._steps == 0:  # the expert reads the goal when it is made
            problem, goal = self.env.simulator.env.parsed_problem, goal_of("libero_object", 7, tasks[0])
            assert problem["goal_state"] == goal
            problem["goal_state"] = goal_of("libero_object", 7, self.always or tasks[0])
            self.expert = PickAndPlaceExpert(self.env.simulator)
            problem["goal_state"] = goal
        return self.expert.act()[None, None]


@pytest.fixture
def env(throw_away, no_pictures, monkeypatch):
    from lerobot_vla0.libero.env import LiberoEnv

    env = LiberoEnv("libero_object", 7, image_size=56, assets="primitive")
    monkeypatch.setattr(module, "switch_environment", lambda *_, **__: env)
    yield env
    env.close()


@pytest.mark.slow
def test_who_reads_and_who_does_not(env, config, monkeypatch):
    """The scene's own instruction and one of the others."""
    every = module.jobs_of
    monkeypatch.setattr(
        module, "jobs_of", lambda config: [job for job in every(config) if job[1] in (MILK, BUTTER)]
    )
    outcomes = {}
    for name, always in (("reads", None), ("own", MILK), ("another", BUTTER)):
        config.out = config.out.with_name(name)
        monkeypatch.setattr(module, "load_agent", lambda config, always=always: Scripted(env, always))
        result = json.loads((follow_words(config) / "words.json").read_text())
        outcomes[name] = {row["instruction"]: row["reached"] for row in result["episodes"]}
        # What is carried to the basket was grasped.
        assert all(row["grasped"] == row["reached"] for row in result["episodes"])
        share = {"reads": 1.0, "own": 0.0, "another": None}[name]  # it does not solve the scene itself
        assert result["summary"]["share"] == share
    assert outcomes == {
        "reads": {MILK: ASKED, BUTTER: ASKED},
        "own": {MILK: ASKED, BUTTER: OWN},
        "another": {MILK: ANOTHER, BUTTER: ASKED},
    }


@pytest.mark.slow
def test_grasped_and_dropped(env):
    """The step limit comes while the object is in the air."""
    env._max_episode_steps = 70
    row = play_episode(env, Scripted(env, BUTTER), MILK, 1)
    assert row == {"reached": NONE, "grasped": ANOTHER} and went_for(row) == ANOTHER


@pytest.mark.slow
def test_policy(env, config, capsys):
    """A real one, for a few steps of every episode: it reaches nothing."""
    env._max_episode_steps = 4
    folder = follow_words(config)
    assert {path.name for path in folder.iterdir()} == {"words.json", "words.md"}
    result, report = json.loads((folder / "words.json").read_text()), (folder / "words.md").read_text()
    assert len(result["episodes"]) == 6 and {went_for(row) for row in result["episodes"]} == {NONE}
    assert {row["init_state"] for row in result["episodes"]} == {1}
    assert result["settings"]["stand_in_assets"] and len(result["settings"]["weights"]) == 64
    assert report in capsys.readouterr().out and f"| 7: {MILK} | 0/1 | 0 | 0 | 0 | 0 | 0 | 0 | 5 |" in report
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        follow_words(config)
