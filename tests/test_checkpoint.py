"""Checkpoints of earlier and later versions, and folders that are whole or not there."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, make_config
from draccus.utils import DecodingError
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file

from lerobot_vla0.cli import main
from lerobot_vla0.configuration_vla0 import FORMAT_VERSION
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

# A policy of version 0.1.0 with random weights, pushed as it is: never written anew. expected.json holds what
# it answered then.
V1 = ROOT / "tests/data/checkpoint_v1"


def test_checkpoint_of_version_1():
    expected = json.loads((V1 / "expected.json").read_text())
    policy = VLA0Policy.from_pretrained(V1)
    assert policy.config.format_version == 1
    preprocess, postprocess = make_pre_post_processors(policy.config, str(V1))
    ramp = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    batch = preprocess({"observation.images.image": ramp, "task": "open the drawer"})
    chunk = policy.predict_action_chunk(batch)
    assert chunk.long().tolist() == expected["integers"]
    torch.testing.assert_close(postprocess(chunk), torch.tensor(expected["actions"]))


@pytest.fixture
def edited(tmp_path):
    def edit(**fields):
        folder = shutil.copytree(V1, tmp_path / "checkpoint")
        config = json.loads((folder / "config.json").read_text())
        config = {k: v for k, v in (config | fields).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return edit


def test_newer_format(edited):
    """Also when it has fields that are unknown here."""
    folder = edited(format_version=FORMAT_VERSION + 1, field_of_the_future=True)
    message = (
        f"version {FORMAT_VERSION + 1} was written by a newer lerobot_policy_vla0.*pip install --upgrade"
    )
    for load in (PreTrainedConfig.from_pretrained, VLA0Policy.from_pretrained):
        with pytest.raises(DecodingError, match=message):
            load(folder)
    with pytest.raises(SystemExit, match=f"lerobot-vla0 card: .*{message}"):
        main(["card", f"--policy.path={folder}"])


def test_format_version_is_optional_and_a_number(edited):
    assert VLA0Policy.from_pretrained(edited(format_version=None)).config.format_version == 1


@pytest.mark.parametrize("version", [0, "new"])
def test_format_version_that_is_none(version, edited):
    with pytest.raises(DecodingError, match=f"format_version.*{version!r} is not allowed"):
        PreTrainedConfig.from_pretrained(edited(format_version=version))


# ---------------------------------------------------------------------------------- numbers that move a robot

INF, NAN = float("inf"), float("nan")
DIM = 3
# min and max of a 3-dimensional action → what is said of them.
BROKEN = {
    "NaN": ([NAN, 0.0, 0.0], [1.0] * 3, "min=nan in dimension 0: it must be finite"),
    "all NaN": ([NAN] * 3, [NAN] * 3, "min=nan in dimension 0: it must be finite"),
    "inf": ([0.0] * 3, [1.0, INF, 1.0], "max=inf in dimension 1: it must be finite"),
    "-inf": ([0.0, 0.0, -INF], [1.0] * 3, "min=-inf in dimension 2: it must be finite"),
    "turned round": ([0.0, 1.0, 0.0], [1.0, 0.0, 1.0], "min=1 above max=0 in dimension 1"),
    "one of three": ([-1.0], [1.0], "1 values of min and 1 of max: there must be 3"),
    "one max": ([-1.0] * 3, [1.0], "3 values of min and 1 of max: there must be 3"),
    "four of three": ([-1.0] * 4, [1.0] * 4, "4 values of min and 4 of max: there must be 3"),
    "none": ([], [], "0 values of min and 0 of max: there must be 3"),
    "column": ([[-1.0]] * 3, [[1.0]] * 3, r"no vector of numbers .*shape \(3, 1\)"),
    "matrix": ([[-1.0] * 3] * 3, [[1.0] * 3] * 3, r"no vector of numbers .*shape \(3, 3\)"),
    "wide": ([-3e38, 0.0, 0.0], [3e38, 1.0, 1.0], r"max - min=6e\+38 in dimension 0: it must be finite"),
}
TOO_LARGE = {
    "too large": ([0.0] * 3, [1.0, 1e39, 1.0], r"max=(1e\+39|inf) in dimension 1: it must be finite")
}
NO_NUMBERS = {
    "texts": (["a"] * 3, [1.0] * 3, "min that is no vector of numbers"),
    "null": (None, [1.0] * 3, "min that is no vector of numbers"),
    "dict": ({"x": 1}, [1.0] * 3, "min that is no vector of numbers"),
    "ragged": ([[1.0], [1.0, 2.0], [1.0]], [1.0] * 3, "min that is no vector of numbers"),
    "complex": ([1j, 0.0, 0.0], [1.0] * 3, "min that is no vector of numbers"),
}


def three_dimensional_config(**overrides):
    action = {"action": PolicyFeature(FeatureType.ACTION, (DIM,))}
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (DIM,))}
    camera = {"observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, 32, 32))}
    return make_config("vlm", output_features=action, input_features={**camera, **state}, **overrides)


@pytest.mark.parametrize("name", {**BROKEN, **TOO_LARGE, **NO_NUMBERS})
@pytest.mark.parametrize("feature", ["action", "action.task.open", "observation.state"])
def test_statistics_of_a_data_set(name, feature):
    low, high, message = {**BROKEN, **TOO_LARGE, **NO_NUMBERS}[name]
    good = {"min": [-1.0] * DIM, "max": [1.0] * DIM}
    stats = {"action": good, "action.task.open": good, "observation.state": good}
    stats[feature] = {"min": low, "max": high}
    with pytest.raises(ValueError, match=f"dataset_stats: {feature!r} .*{message}"):
        make_vla0_pre_post_processors(three_dimensional_config(action_norm="task", use_state=True), stats)


def state_file(folder, kind: str):
    return next(folder.glob(f"policy_{kind}processor_step_*.safetensors"))


@pytest.fixture
def checkpoint(edited):
    folder = edited()
    assert PreTrainedConfig.from_pretrained(folder).action_feature.shape == (DIM,)
    return folder


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("name", {**BROKEN, **TOO_LARGE})
def test_statistics_of_a_checkpoint(name, kind, checkpoint):
    low, high, message = {**BROKEN, **TOO_LARGE}[name]
    file = state_file(checkpoint, kind)
    values = {"min": torch.tensor(low, dtype=torch.float64), "max": torch.tensor(high, dtype=torch.float64)}
    save_file(load_file(file) | {f"action.{key}": value for key, value in values.items()}, file)
    with pytest.raises(ValueError, match=f"policy_{kind}processor.json: 'action' .*{message}"):
        VLA0Policy.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    main(["export", f"--policy.path={V1}", f"--out={out}"])
    return out


@pytest.mark.parametrize("name", BROKEN)
def test_statistics_of_an_action_spec(name, exported, tmp_path):
    low, high, message = BROKEN[name]
    folder = shutil.copytree(exported, tmp_path / "exported")
    spec = json.loads((folder / "action_spec.json").read_text())
    (tensors,) = [state for key, state in spec["checkpoint"]["state"].items() if "unnormalizer" in key]
    tensors["action.min"]["values"], tensors["action.max"]["values"] = low, high
    (folder / "action_spec.json").write_text(json.dumps(spec))
    with pytest.raises(SystemExit, match=f"lerobot-vla0 import: .*'action' .*{message}"):
        main(["import", f"--from={folder}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "step", "field", "value", "message"),
    [
        (
            "pre",
            -1,
            "num_bins",
            255,
            "num_bins=255 of 'vla0_action_encoder_processor' differs from the 1000",
        ),
        ("pre", -1, "num_bins", None, "num_bins=None of 'vla0_action_encoder_processor' differs"),
        ("post", 0, "num_bins", 10**9, "num_bins=1000000000 of 'vla0_action_decoder_processor' differs"),
        ("post", 0, "num_bins", -1, "num_bins=-1 of 'vla0_action_decoder_processor' differs"),
        ("post", 1, "eps", 5.0, r"eps=5.0 of 'unnormalizer_processor' must be in \[0, 0.001\]"),
        ("post", 1, "eps", NAN, "eps=nan of 'unnormalizer_processor' must be"),
        ("post", 1, "eps", "1", "eps='1' of 'unnormalizer_processor' must be"),
        ("pre", 3, "eps", -1.0, "eps=-1.0 of 'normalizer_processor' must be"),
        (
            "post",
            1,
            "norm_map",
            {"ACTION": "IDENTITY"},
            r"norm_map\['ACTION'\]='IDENTITY' of 'unn",
        ),
        ("post", 1, "norm_map", {}, r"norm_map\['ACTION'\]=None"),
        ("pre", 3, "norm_map", {"ACTION": "MIN_MAX", "STATE": "MEAN_STD"}, r"norm_map\['STATE'\]='MEAN_STD'"),
    ],
)
def test_settings_of_processors_agree_with_the_config(kind, step, field, value, message, checkpoint):
    file = checkpoint / f"policy_{kind}processor.json"
    content = json.loads(file.read_text())
    content["steps"][step]["config"][field] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file.name}: {message}"):
        VLA0Policy.from_pretrained(checkpoint)


def test_processors_of_two_trainings(checkpoint):
    file = state_file(checkpoint, "pre")
    tensors = load_file(file)
    save_file(tensors | {"action.max": tensors["action.max"] + 1}, file)
    with pytest.raises(ValueError, match="have different max of 'action': they are not of one training"):
        VLA0Policy.from_pretrained(checkpoint)
