import dataclasses
import json
import re
import shutil

import draccus
import pytest
from conftest import ROOT, make_config
from draccus.utils import DecodingError
from draccus.wrappers.docstring import get_attribute_docstring, get_preferred_help_text
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig

from lerobot_vla0 import VLA0Config
from lerobot_vla0.configuration_vla0 import RETIRED, check_joints

OLD = ROOT / "tests/data/checkpoint_v1"


def test_defaults_are_the_published_recipe():
    config = VLA0Config(device="cpu")
    assert config.type == "vla0"
    assert (config.vlm, config.chunk_size, config.n_action_steps) == ("Qwen/Qwen2.5-VL-3B-Instruct", 8, 8)
    assert (config.num_bins, config.image_size, config.crop_ratio) == (1000, 224, 0.875)
    assert config.jitter == [0.2, 0.2, 0.2, 0.05]
    assert (config.action_mask_prob, config.action_mask_skip_prob) == (0.4, 0.1)
    optimizer = config.get_optimizer_preset()
    assert (optimizer.lr, optimizer.weight_decay, optimizer.grad_clip_norm) == (4e-5, 1e-10, 1.0)
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert config.get_scheduler_preset() is None
    assert config.action_delta_indices == list(range(8)) and config.observation_delta_indices is None


def test_every_field_is_explained_in_help():
    """`lerobot-train --policy.type=vla0 --help` is the manual; its text is the comment above a field."""
    names = [f.name for f in dataclasses.fields(VLA0Config)]
    own = names[names.index("format_version") :]
    texts = [get_preferred_help_text(get_attribute_docstring(VLA0Config, name)) for name in own]
    assert all(text and "noqa" not in text and "%" not in text for text in texts)
    groups = [int(n) for text in texts for n in re.findall(r"\[(\d)\. ", text)]
    assert groups == [1, 2, 3, 4, 5, 6]


def test_round_trip_without_the_server(tmp_path):
    config = make_config("vlm", cameras=["observation.images.image2"], num_bins=255, server="http://host/v1")
    config.save_pretrained(tmp_path)
    assert config.server == "http://host/v1"
    assert PreTrainedConfig.from_pretrained(tmp_path) == dataclasses.replace(config, server=None)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("chunk_size", 0, "at least 1"),
        ("chunk_size", None, "at least 1"),
        ("n_action_steps", 9, "in 1..chunk_size (8)"),
        ("num_bins", 10**9, "in 2..100000"),
        ("n_obs_steps", 2, "1 (VLA-0 has no history)"),
        ("temperature", NAN, "at least 0 and finite"),
        ("optimizer_lr", INF, "above 0 and finite"),
        ("dtype", "fp8", "one of bfloat16, float16, float32"),
        ("jitter", [0.2, 0.2, 0.2, 0.6], "the last in [0, 0.5]"),
        ("cameras", ["a", "a"], "list of different image keys"),
        ("camera_regions", {"a": [0.5, 0.0, 0.6, 1.0]}, "of a part that lies in it"),
        ("camera_regions", {"a": [0.0, 0.0, 1.0]}, "[top, left, height, width]"),
        ("picture_rule", "mine", "vla0-trl or NVlabs"),
        ("ensemble_size", 8, "there is nothing to average"),
        ("normalization_mapping", {"ACTION": NormalizationMode.MEAN_STD}, "one of MIN_MAX, QUANTILES"),
        ("server", "localhost:8000", "an http:// or https:// URL"),
        ("format_version", 99, "pip install --upgrade lerobot_policy_vla0"),
    ],
)
def test_values_that_are_refused(name, value, message):
    with pytest.raises(DecodingError, match=rf"^{name}.*{re.escape(message)}"):
        VLA0Config(device="cpu", **{name: value})


def test_lists_as_yaml_beside_the_path_of_a_checkpoint():
    """LeRobot reads these options as JSON, and leaves '[a, b]' a text."""
    options = [
        "--cameras=[observation.images.image2, observation.images.image]",
        "--normalization_mapping={VISUAL: IDENTITY, STATE: MIN_MAX, ACTION: QUANTILES}",
        "--camera_regions={observation.images.image: [0, 0, 0.5, 1]}",
        "--jitter=[0, 0, 0, 0]",
    ]
    config = PreTrainedConfig.from_pretrained(OLD, cli_overrides=options)
    assert config.cameras == ["observation.images.image2", "observation.images.image"]
    assert config.normalization_mapping["ACTION"] is NormalizationMode.QUANTILES
    assert config.camera_regions["observation.images.image"] == [0, 0, 0.5, 1]
    assert config.jitter == [0, 0, 0, 0]
    cameras = "--policy.cameras=[observation.images.image]"
    parsed = draccus.parse(Options, args=["--policy.type=vla0", "--policy.device=cpu", cameras])
    assert parsed.policy.cameras == ["observation.images.image"]


@dataclasses.dataclass
class Options:
    policy: PreTrainedConfig


def test_fields_of_the_first_version(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "old")
    saved = json.loads((folder / "config.json").read_text())

    def read(**changes):
        (folder / "config.json").write_text(json.dumps(saved | changes))
        return PreTrainedConfig.from_pretrained(folder)

    assert not RETIRED.keys() & vars(read(draft_length=63, stream=True)).keys()
    config = read(crop_rounding="even", resize_antialias=False, jitter_hue=0.1)
    assert config.picture_rule == "NVlabs" and config.jitter == [0.2, 0.2, 0.2, 0.1]
    with pytest.raises(DecodingError, match="ensemble_exponential=True needs lerobot_policy_vla0 0.1.0"):
        read(ensemble_exponential=True)
    with pytest.raises(DecodingError, match="fields `unknown` are not valid"):
        read(unknown=1)
    with pytest.raises(DecodingError, match="format_version=99 is not allowed"):
        read(format_version=99)


def feature(kind: str, *shape: int) -> PolicyFeature:
    return PolicyFeature(FeatureType[kind], shape)


def features(**changes):
    image = feature("VISUAL", 3, 64, 64)
    inputs = {"observation.images.a": image, "observation.state": feature("STATE", 6)}
    outputs = {"action": feature("ACTION", 6)}
    return {"device": "cpu", "input_features": inputs, "output_features": outputs} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_features": {}}, "needs an `action` vector"),
        ({"input_features": {}}, "at least one camera"),
        ({"cameras": ["top"]}, r"--policy.cameras names \['top'\], which are not there. Present: .*images.a"),
        ({"input_features": {"observation.images.d": feature("VISUAL", 1, 64, 64)}}, "depth"),
        ({"use_relative_actions": True, "output_features": {"action": feature("ACTION", 7)}},
         "as long as the action"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        VLA0Config(**features(**changes)).validate_features()


def test_a_robot_with_fewer_joints():
    check_joints(VLA0Config(**features()), 7)
    with pytest.raises(ValueError, match="the robot has 5 joints .* actions of 6 dimensions"):
        check_joints(VLA0Config(**features()), 5)
