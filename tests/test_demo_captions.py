import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, make_config, run_script
from transformers import AutoModelForImageTextToText

from lerobot_vla0.demo import captions as module
from lerobot_vla0.demo.captions import LAYOUTS_PER_RESET, CaptionsConfig, captions, render_layouts
from lerobot_vla0.libero.assets import prepare_libero
from lerobot_vla0.modeling_vla0 import VLA0Policy


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layouts": 0}, r"layouts=0 must be a multiple of 10, and not 0\."),
        ({"layouts": 15}, r"layouts=15 must be a multiple of 10"),
        ({"init_states": 51}, r"init_states=51 must be in 1\.\.50"),
        ({"workers": 0}, r"workers=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 at least 0"),
        ({"image_size": 8}, r"image_size=8 must be in"),
        ({"tasks": [10]}, r"10"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        captions(CaptionsConfig(out=tmp_path / "out", **overrides))
    assert not (tmp_path / "out").exists()


def test_never_overwrites(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        captions(CaptionsConfig(out=tmp_path))


def parse(text: str) -> dict[str, tuple[int, int]]:
    parts = re.findall(r"([a-z ]+) (\d+) (\d+)(?:, |$)", text)
    assert ", ".join(" ".join(part) for part in parts) == text
    return {name: (int(x), int(y)) for name, x, y in parts}


@pytest.mark.slow
def test_captions_say_what_is_where(throw_away):
    """Of the stand-ins in scene 0, the bottle of salad dressing alone has green."""
    assets = str(prepare_libero("libero_object", "primitive"))
    config = CaptionsConfig(out="unused", image_size=256, assets=assets, seed=3)
    rows = [row for reset in range(3) for row in render_layouts(config, 0, reset)]
    assert len(rows) == 3 * LAYOUTS_PER_RESET
    shown = []
    for row in rows:
        points = parse(row["completion"][0]["content"])
        shown.append(points)
        assert 1 <= len(points) <= 6
        red, green, blue = np.asarray(row["images"][0]).astype(int).transpose(2, 0, 1)
        y, x = np.nonzero((green > red + 30) & (green > blue + 30))
        assert ("salad dressing" in points) == (len(x) > 5)
        if len(x) > 5:
            place = np.array([x.mean(), y.mean()]) * 100 / 256
            # The cap, which is above the bottle's centre.
            assert abs(place[0] - points["salad dressing"][0]) < 4
            assert 0 < points["salad dressing"][1] - place[1] < 15
    assert {len(points) for points in shown} == {1, 2, 3, 4, 5, 6}
    # The objects change places and the order in which they are named.
    assert len({points["milk"] for points in shown if "milk" in points}) > 5
    assert len({next(iter(points)) for points in shown}) == 6
    again = render_layouts(config, 0, 1)[4]
    assert again["completion"] == rows[LAYOUTS_PER_RESET + 4]["completion"]
    assert again["images"][0].tobytes() == rows[LAYOUTS_PER_RESET + 4]["images"][0].tobytes()


@pytest.mark.slow
def test_trl_trains_a_vlm_on_them_for_a_policy(tmp_path, tiny_vlm, process_env):
    """The commands of trl_captions_cpu.yaml, cut short, as processes;
    then a policy that begins with the result."""
    data, out = tmp_path / "data", tmp_path / "vlm"
    run_script(
        "python", "-m", "lerobot_vla0.demo.captions", f"--out={data}", "--tasks=[0]", "--layouts=10",
        "--image_size=112", "--assets=primitive", env=process_env,
    )  # fmt: skip
    settings = json.loads((data / module.RECORD_FILE).read_text())["settings"]
    assert settings["tasks"] == [0] and settings["init_states"] == 10
    run_script(
        "trl", "sft", "--config", f"{ROOT}/configs/trl_captions_cpu.yaml",
        f"--model_name_or_path={tiny_vlm}", f"--dataset_name={data}", f"--output_dir={out}", "--max_steps=3",
        "--per_device_train_batch_size=2", "--warmup_steps=1", env=process_env,
    )  # fmt: skip
    policy = VLA0Policy(make_config(out))
    before, after = (AutoModelForImageTextToText.from_pretrained(vlm).state_dict() for vlm in (tiny_vlm, out))
    for part in ("visual", "language_model"):
        assert any(part in key and not torch.equal(before[key], after[key]) for key in before)
    loaded = policy.model.state_dict()
    assert loaded.keys() == after.keys() and all(torch.equal(loaded[key], after[key]) for key in after)
