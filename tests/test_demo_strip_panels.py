import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lerobot_vla0.demo.strip_panels import LossPanel, Score, SuccessPanel, read_score, split_folders
from lerobot_vla0.libero.results import save_episode

SETTINGS = {"weights": "abc", "policy_path": "there", "policy": {}, "versions": {}, "stand_in_assets": True}


def save(folder: Path, outcomes: list[bool], settings: dict = SETTINGS, task: int = 2) -> Path:
    for episode, success in enumerate(outcomes):
        row = {"suite": "libero_object", "task_id": task, "task": f"task {task}", "episode": episode}
        row |= {"init_state": 40 + episode, "success": success, "steps": 9}
        save_episode(folder, "1/1", settings, row)
    return folder


def test_score(tmp_path):
    score = read_score(save(tmp_path / "eval_held_out", [True] * 9 + [False]), "abc")
    assert (score.name, score.episodes) == ("held out", "initial states 40–49")
    assert (score.successes, score.trials, score.stand_ins) == (9, 10, True)
    assert (score.low, score.high) == pytest.approx((59.6, 98.2), abs=0.05)


def test_score_of_several_tasks(tmp_path):
    settings = SETTINGS | {"stand_in_assets": False}
    save(tmp_path / "eval", [True], settings)
    score = read_score(save(tmp_path / "eval", [False], settings, task=3), "abc")
    assert (score.name, score.episodes, score.stand_ins) == ("eval", "2 tasks", False)


def test_bad_folders(tmp_path):
    with pytest.raises(
        ValueError, match="reports='.*/nowhere' is no folder: give the --out of `lerobot-vla0"
    ):
        read_score(tmp_path / "nowhere", "abc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="reports='.*/empty' holds no finished episode: give the --out"):
        read_score(tmp_path / "empty", "abc")
    folder = save(tmp_path / "eval", [True])
    with pytest.raises(ValueError, match=r"reports='.*/eval' holds results of other weights \(there\)"):
        read_score(folder, "other")
    results = folder / "episodes-1of1.jsonl"
    results.write_text(results.read_text().replace('"init_state"', '"state"'))
    with pytest.raises(ValueError, match="file in .*/eval is damaged: the field 'init_state' is missing"):
        read_score(folder, "abc")
    (folder / "settings.json").write_text(json.dumps({"policy_path": "there"}))
    with pytest.raises(ValueError, match="settings.json is damaged: the field 'weights' is missing"):
        read_score(folder, "abc")
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match="reports='.*/eval' lacks settings.json: give the --out"):
        read_score(folder, "abc")


def test_names_of_folders():
    assert split_folders("a, b/c") == [Path("a"), Path("b/c")]
    for reports in ("", "a,,b", "a,a"):
        with pytest.raises(ValueError, match=f"reports='{reports}' must name results folders"):
            split_folders(reports)


def drawn(panel) -> tuple[list[str], Figure]:
    figure = Figure()
    panel.draw(figure.add_subplot())
    figure.canvas.draw()
    return [text.get_text() for text in figure.axes[0].texts], figure


def test_loss():
    panel = LossPanel({"step": [50, 3000], "loss": [2.5, 0.3125]})
    (line,) = drawn(panel)[1].axes[0].lines
    assert line.get_xydata().tolist() == [[50, 2.5], [3000, 0.3125]]
    assert panel.result == "0.312 nats/token, step 3,000"


@pytest.mark.parametrize("loss", [[1.0], [float("nan")], [2.0, float("inf")], [0.0, 0.0]])
def test_losses_that_are_hard_to_draw(loss):
    (axes,) = drawn(LossPanel({"step": list(range(50, 50 + len(loss))), "loss": loss}))[1].axes
    assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all() and axes.get_ylim()[0] == 0


def test_success():
    name = "a name that is much too long for its place"
    held_out = Score(name, "initial states 40–49", 9, 10, 59.6, 98.2, True)
    panel = SuccessPanel([Score("seen", "2 tasks", 10, 10, 72.2, 100.0, False), held_out])
    texts, figure = drawn(panel)
    assert texts == [
        "seen", "10/10", "2 tasks", "72.2–100.0 %",
        "a name that is much too l…", "9/10", "initial states 40–49", "59.6–98.2 %",
        "stand-in assets: not LIBERO scores",
    ]  # fmt: skip
    ends = [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert ends == [[0, 100], [72.2, 100.0], [100.0], [0, 100], [59.6, 98.2], [90.0]]
    assert panel.height > SuccessPanel(panel.scores[:1]).height
    assert "stand-in assets: not LIBERO scores" not in drawn(SuccessPanel(panel.scores[:1]))[0]
