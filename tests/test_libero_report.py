import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lerobot_vla0.libero.report import compare, mcnemar, read_episodes, wilson, write_report


def row(suite="libero_object", task_id=0, episode=0, success=True, steps=100) -> dict:
    task = {"suite": suite, "task_id": task_id, "task": "pick up the milk", "episode": episode}
    return {**task, "init_state": episode, "success": success, "steps": steps}


def write(folder, name, rows, tail="") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)


def test_wilson_at_known_values():
    # https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval, Wilson score interval, computed
    # by hand
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson(1892, 2000)
    assert (high - low) / 2 == pytest.approx(0.01, abs=5e-4)  # ±1.0 at 2,000 episodes
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_rate(counts):
    successes, trials = counts
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1


def test_mcnemar():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * 9 / 256)


def test_a_line_cut_off_by_a_kill_does_not_count(tmp_path):
    write(tmp_path / "r", "episodes-1of2.jsonl", [row(episode=0)], tail='{"suite": "libero_ob')
    write(tmp_path / "r", "episodes-2of2.jsonl", [row(episode=1, success=False)])
    episodes = read_episodes(tmp_path / "r")
    assert [episode for _, _, episode in episodes] == [0, 1]


def test_damage(tmp_path):
    write(tmp_path / "a", "episodes-1of1.jsonl", [row(), {"suite": "x"}, row(episode=1)])
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_episodes(tmp_path / "a")
    write(tmp_path / "b", "episodes-1of1.jsonl", [row(), row(success=False)])
    with pytest.raises(ValueError, match="there twice, with different outcomes"):
        read_episodes(tmp_path / "b")


def test_report(tmp_path):
    rows = [row("libero_object", t, e, success=(t + e) % 4 != 0) for t in range(2) for e in range(4)]
    rows += [row("libero_goal", 3, e, success=False) for e in range(4)]
    write(tmp_path / "r", "episodes-1of1.jsonl", rows)
    settings = {"stand_in_assets": True, "episodes_in_all": 16, "policy": {}}
    (tmp_path / "r/settings.json").write_text(json.dumps(settings))
    text = write_report(tmp_path / "r").read_text()
    assert "these are not LIBERO scores" in text and "Unfinished: 12 of 16 episodes" in text
    assert "| libero_object | 0: pick up the milk | 3/4 = 75.0 % | 30.1–95.4 % | 100 |" in text
    assert "| **libero_object** | all | 6/8 = 75.0 %" in text and "| **all** | all | 6/12 = 50.0 %" in text
    assert "| libero_goal | 3: pick up the milk | 0/4 = 0.0 % | 0.0–49.0 % | – |" in text
    assert (tmp_path / "r/report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no finished episode"):
        write_report(tmp_path)


def test_comparison_is_paired(tmp_path):
    write(tmp_path / "a", "episodes-1of1.jsonl", [row(episode=e, success=e < 7) for e in range(9)])
    write(tmp_path / "b", "episodes-1of1.jsonl", [row(episode=e, success=e < 2) for e in range(8)])
    text = compare(tmp_path / "a", tmp_path / "b")
    assert "8 episodes in common" in text and "both 2, only A 5, only B 0, neither 1" in text
    assert "p = 0.0625" in text
    with pytest.raises(ValueError, match="no finished episode in common"):
        compare(tmp_path / "a", tmp_path)
