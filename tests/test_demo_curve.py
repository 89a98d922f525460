import pytest

from lerobot_vla0.demo.curve import CurveConfig, plot_curve, read_log

# What lerobot-train 0.6.1 prints: a progress bar that is rewritten, and log lines behind it.
BAR = "\rTraining:  50%|█████     | {0}/3000 [00:27<02:32,  1.64step/s]INFO 2026-11-23 23:45:52 train.py:641 "
LINE = (
    BAR + "step:{1} smpl:4K ep:40 epch:1.98 loss:{2} grdn:0.563 lr:6.3e-05 updt_s:0.333 token_accuracy:0.582 "
)


def write(path, rows, tail="action_error_bins:12.5 action_clipped:0.000\n"):
    path.write_text("INFO Creating dataset\n" + "".join(LINE.format(*row) + tail for row in rows))
    return path


def test_steps_are_counted_because_lerobot_rounds_them(tmp_path):
    log = write(tmp_path / "log", [(500, "500", 2.5), (1000, "1K", 1.25), (1500, "2K", "9e-01")])
    metrics = read_log(log)
    assert metrics["step"] == [500, 1000, 1500] and metrics["loss"] == [2.5, 1.25, 0.9]
    assert metrics["token_accuracy"] == [0.582] * 3 and metrics["action_error_bins"] == [12.5] * 3


def test_plot(tmp_path, capsys):
    log = write(tmp_path / "log", [(50, "50", 2.5), (100, "100", 1.25)])
    path = plot_curve(CurveConfig(log=log, out=tmp_path / "new/loss.png"))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "step 100: loss 1.25, token_accuracy 0.582, action_error_bins 12.5" in capsys.readouterr().out


def test_other_policies_have_a_loss_only(tmp_path):
    log = write(tmp_path / "log", [(50, "50", 2.5)], tail="\n")
    log.write_text(log.read_text().replace("token_accuracy:0.582", ""))
    assert set(read_log(log)) == {"step", "loss"}


@pytest.mark.parametrize(
    ("rows", "message"), [([], "has no line with metrics"), ([(2000, "2K", 1.0)], "begins at step 2K")]
)
def test_not_a_whole_run(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_log(write(tmp_path / "log", rows))


def run_log(steps, *, total, start=0, every=200, loss="1.0"):
    """What lerobot-train 0.6.1 prints: settings, the bar of the steps that are left, lines."""
    settings = f"INFO {{'eval_steps': 0,\n 'log_freq': {every},\n 'policy': {{'n_action_steps': 8}},\n"
    bar = f" 'steps': {total},\n 'x': 1}}\n\rTraining:   0%|    | 0/{total - start} [00:00<?, ?step/s]"
    shown = [(s, str(s) if s < 1000 else f"{s / 1000:.0f}K", loss) for s in steps]
    return settings + bar + "".join(LINE.format(*row) + "action_error_bins:12.5\n" for row in shown)


def test_a_resumed_runs_log(tmp_path):
    """It begins at a step that is printed rounded: 1400 and 1600 would be 1K and 2K."""
    steps = list(range(1400, 3001, 200))
    (tmp_path / "log").write_text(run_log(steps, total=3000, start=1300))
    assert read_log(tmp_path / "log")["step"] == steps


@pytest.mark.parametrize("start", [400, 1200, 0])
def test_a_run_that_was_appended_replaces_the_steps_that_it_repeats(tmp_path, start):
    """Resumed from the last checkpoint before it was killed, or begun again."""
    first = run_log(range(200, 1601, 200), total=3000, loss="2.0")
    again = list(range(start + 200, 2401, 200))
    (tmp_path / "log").write_text(first + run_log(again, total=3000, start=start, loss="1.0"))
    metrics = read_log(tmp_path / "log")
    assert metrics["step"] == list(range(200, 2401, 200))
    assert metrics["loss"] == [2.0 if step <= start else 1.0 for step in metrics["step"]]


def test_appended_without_settings(tmp_path):
    log = write(tmp_path / "log", [(400, "400", 3.0), (800, "800", 2.0), (1200, "1K", 1.5)])
    log.write_text(log.read_text() + write(tmp_path / "more", [(800, "800", 1.0)]).read_text())
    assert read_log(log)["step"] == [400, 800] and read_log(log)["loss"] == [3.0, 1.0]
    log.write_text(log.read_text() + write(tmp_path / "more", [(5000, "5K", 1.0)]).read_text())
    with pytest.raises(ValueError, match="begins at step 5K, which is rounded"):
        read_log(log)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e+30"])
def test_a_loss_that_is_not_finite(tmp_path, value):
    log = write(tmp_path / "log", [(50, "50", 2.5), (100, "100", value)])
    assert read_log(log)["loss"] == pytest.approx([2.5, float(value)], nan_ok=True)
    assert plot_curve(CurveConfig(log=log, out=tmp_path / "loss.png")).stat().st_size > 1000
