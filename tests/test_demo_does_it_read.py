import json
from types import SimpleNamespace

import does_it_read as module
import numpy as np
import pytest
from does_it_read import (
    ANOTHER,
    ASKED,
    BEFORE,
    NONE,
    OWN,
    ReadConfig,
    does_it_read,
    jobs_of,
    play_episode,
    report_of,
    summary_of,
    went_for,
)

import lerobot_vla0
from lerobot_vla0.libero.report import wilson

MILK = "pick up the milk and place it in the basket"  # task 7
BUTTER = "pick up the butter and place it in the basket"  # of another object in its scene


def row(task: int, state: int, reached: str, grasped: str = NONE, own: bool = False) -> dict:
    known = {"task_id": task, "init_state": state, "instruction": f"own {task}" if own else "other"}
    return known | {"own": own, "reached": reached, "grasped": grasped}


ROWS = [
    # A reached goal counts more than the object that was grasped before.
    *(row(0, 0, ASKED, ASKED, own=True), row(0, 0, ASKED, OWN), row(0, 0, OWN, ASKED)),
    *(row(0, 0, NONE, ASKED), row(0, 0, BEFORE)),
    # Not solved with its own instruction: left out of the share.
    *(row(0, 1, NONE, ASKED, own=True), row(0, 1, ASKED, ASKED), row(0, 1, NONE, ANOTHER), row(0, 1, NONE)),
    *(row(3, 0, ASKED, own=True), row(3, 0, ANOTHER, ANOTHER), row(3, 0, NONE, OWN), row(3, 0, ASKED, ASKED)),
]


def test_summary_and_report():
    """3 of the 6 episodes in the two scenes that are solved with their own instruction."""
    counts = {"scenes": 3, "scenes_solved": 2, "asked": 3, "asked_and_reached": 2, "of": 6}
    assert summary_of(ROWS) == {**counts, "interval": wilson(3, 6)}
    text = report_of(ROWS, "libero_object", stand_ins=True)
    assert (
        "| 0: own 0 | 1/2 | 2 | 1 | 0 | 1 | 0 | 1 | 1 |\n| 3: own 3 | 1/1 | 1 | 0 | 1 | 0 | 1 | 0 | 0 |"
        in text
    )
    assert "| **all** | 2/3 | 3 | 1 | 1 | 1 | 1 | 1 | 1 |" in text and "not LIBERO scores" in text
    assert "3/6 episodes (95 % interval 18.8–81.2 %) and gets it done in 2." in text
    nothing = [row(0, 0, NONE, own=True), row(0, 0, ASKED)]
    assert summary_of(nothing)["interval"] is None
    assert "solves 0 of 1 scenes" in report_of(nothing, "libero_goal", stand_ins=False)


@pytest.fixture
def config(learnt, tmp_path) -> ReadConfig:
    """One initial state of task 7."""
    small = {"assets": "primitive", "image_size": 56}
    config = ReadConfig(out=tmp_path / "words", tasks=[7], episodes=1, first_init_state=1, **small)
    config.policy = lerobot_vla0.Agent.from_pretrained(learnt[0], device="cpu").policy.config
    return config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policy": None}, "which policy"),
        ({"suite": "libero_foo"}, "libero_foo"),
        ({"episodes": 0}, "episodes=0"),
    ],
)
def test_options_that_cannot_work(config, overrides, message):
    vars(config).update(overrides)
    with pytest.raises(ValueError, match=message):
        does_it_read(config)
    assert not config.out.exists()


def test_jobs(config, monkeypatch):
    monkeypatch.setattr(module, "goals_in_scene", lambda suite, task: [f"own {task}", "b"])
    config.episodes = 2
    assert jobs_of(config) == [
        (7, "own 7", True, 1), (7, "own 7", True, 2), (7, "b", False, 1), (7, "b", False, 2),
    ]  # fmt: skip


class Scripted:
    """In place of an agent: the expert, which follows the instruction or always picks up one object."""

    def __init__(self, env, always: str | None = None) -> None:
        self.env, self.always = env, always

    def act_chunk(self, observation, tasks, plans) -> np.ndarray:
        from expert import PickAndPlaceExpert
        from instructions import goals_in_scene

        assert observation["pixels"]["image"].shape[0] == len(observation["agent_pos"]) == len(plans) == 1
        if self.env._steps == 0:  # the expert reads the goal when it is made
            problem, goals = self.env.simulator.env.parsed_problem, goals_in_scene("libero_object", 7)
            problem["goal_state"] = goals[self.always or tasks[0]]
            self.expert = PickAndPlaceExpert(self.env.simulator)
            problem["goal_state"] = goals[tasks[0]]
        return self.expert.act()[None, None]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    from lerobot_vla0.libero.env import LiberoEnv

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_CONFIG_PATH", str(tmp_path_factory.getbasetemp() / "libero"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        env = LiberoEnv("libero_object", 7, image_size=56, assets="primitive")
        yield env
        env.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("always", "asked", "outcome"),
    [(None, BUTTER, ASKED), (MILK, BUTTER, OWN), (BUTTER, MILK, ANOTHER)],
)
def test_who_reads_and_who_does_not(env, no_pictures, always, asked, outcome):
    row = play_episode(env, Scripted(env, always), asked, 1)
    assert row == {"reached": outcome, "grasped": outcome}


@pytest.mark.slow
def test_grasped_and_not_reached(env, no_pictures, monkeypatch):
    """The step limit comes while the object is in the air."""
    monkeypatch.setattr(env, "_max_episode_steps", 70)
    row = play_episode(env, Scripted(env, BUTTER), MILK, 1)
    assert row == {"reached": NONE, "grasped": ANOTHER} and went_for(row) == ANOTHER


def test_goal_that_holds_before_the_first_step(monkeypatch):
    monkeypatch.setattr(module, "reached", lambda env: ["b"])
    monkeypatch.setattr(module, "options_of", lambda env, instruction: {})
    env = SimpleNamespace(reset=lambda options: ({}, {}))
    assert play_episode(env, None, "b", 0) == {"reached": BEFORE, "grasped": NONE}


@pytest.mark.slow
def test_policy(env, config, no_pictures, monkeypatch):
    """A real policy, for a few steps of every episode: it reaches nothing."""
    monkeypatch.setattr(module, "switch_environment", lambda *_, **__: env)
    monkeypatch.setattr(module, "_agent", None)
    monkeypatch.setattr(env, "_max_episode_steps", 4)
    does_it_read(config)
    result = json.loads((config.out / "words.json").read_text())
    assert [went_for(row) for row in result["episodes"]] == [NONE] * 6
    report = (config.out / "words.md").read_text()
    assert f"| 7: {MILK} | 0/1 | 0 | 0 | 0 | 0 | 0 | 0 | 5 |" in report
