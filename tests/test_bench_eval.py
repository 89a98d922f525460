import json

import pytest

from lerobot_vla0 import cli
from lerobot_vla0.bench import eval as module

SPEEDS = {"loop": 2.0, "lerobot": 4.0, "ours": 6.0}


@pytest.fixture
def measured(monkeypatch):
    """Without simulation: 100 steps each; ours is faster with more actions a look."""

    def run(function, config, plans=None, mode=None, steps=None):
        if function is module.record:
            return [[0] * 100] * config.episodes
        speed = SPEEDS[mode] * (steps if mode == "ours" else 1)
        return {
            "mode": mode, "n_action_steps": steps, "successes": config.episodes, "episodes_per_min": speed,
            "cpu_s": 1.0, "peak_gib": 2.0,
        }  # fmt: skip

    monkeypatch.setattr(module, "_in_a_process", run)
    monkeypatch.setattr(module, "prepare_libero", lambda suite, assets: None)


def test_table_and_file(measured, tmp_path, capsys):
    cli.main(["bench", "eval", f"--out={tmp_path}", "--episodes=3", "--repeats=2", "--policy_ms=100"])
    result = json.loads((tmp_path / "eval.json").read_text())
    rows = {(row["mode"], row["n_action_steps"]): row for row in result["results"]}
    assert set(rows) == {(mode, steps) for mode in module.MODES for steps in (1, 8)}
    assert rows["ours", 8]["times_loop"] == 24 and rows["ours", 8]["times_lerobot"] == 12
    assert rows["ours", 1]["times_lerobot"] == 1.5 and "times_loop" not in rows["loop", 1]
    assert result["lengths"] == [100] * 3 and result["settings"]["policy_ms"] == 100
    shown = capsys.readouterr().out
    assert "3 episodes of 100-100 steps, 100 ms a look" in shown and "24.00" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--modes=[fast]", "modes=['fast'] are not among loop, lerobot, ours"),
        ("--episodes=0", "episodes=0 must be at least 1"),
        ("--episodes=51", "episodes=51 must be at most 50"),
        ("--policy_ms=-1", "policy_ms=-1.0 at least 0"),
        ("--n_action_steps=[8,0]", "n_action_steps=[8, 0] a list of numbers from 1"),
        ("--task=10", "libero_object has the tasks 0..9, not [10]"),
    ],
)
def test_bad_settings(measured, option, message, tmp_path):
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "eval", f"--out={tmp_path}", option])
    assert message in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_all_modes_play_the_same_successful_episodes(throw_away, tmp_path):
    config = module.BenchEvalConfig(n_action_steps=[8], episodes=1, image_size=32, out=tmp_path)
    for row in module.bench_eval(config)["results"]:
        assert row["successes"] == 1 and row["episodes_per_min"] > 0 and row["cpu_s"] > 0
        assert row["peak_gib"] > 0.5
