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
