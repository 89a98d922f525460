"""Checkpoints of earlier and later versions, and folders that are whole or not there."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_config
from draccus.utils import DecodingError
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file

from lerobot_vla0 import Agent
from lerobot_vla0 import checkpoint as module
from lerobot_vla0.cli import main
from lerobot_vla0.configuration_vla0 import FORMAT_VERSION
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import load_processors, make_vla0_pre_post_processors

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


# -------------------------------------------------------------------------------------- files from strangers

MARK = Path("/tmp") / f"vla0-called-{os.getpid()}"  # made where a hostile file gets its way
NORMALIZER = {"registry_name": "normalizer_processor", "config": {}}


@pytest.fixture(autouse=True)
def nothing_is_called():
    yield
    assert not MARK.exists()


HOSTILE = {
    "function": {"class": "os.system", "config": {"command": f"touch {MARK}"}},
    "function of this package": {"class": "lerobot_vla0.files.new_folder", "config": {"out": str(MARK)}},
    "module of the checkpoint": {"class": "evil.Step", "config": {}},
    "LeRobot's class by its path": {
        "class": "lerobot.processor.RenameObservationsProcessorStep",
        "config": {},
    },
    "own class under another name": {"class": "lerobot_vla0.task_stats.field", "config": {}},
    "name and class": {"registry_name": "device_processor", "class": "os.system", "config": {}},
    "no name and class": {
        "registry_name": None,
        "class": "os.system",
        "config": {"command": f"touch {MARK}"},
    },
    "step that loads code": {"registry_name": "action_tokenizer_processor", "config": {}},
    "step that loads a tokenizer": {
        "registry_name": "tokenizer_processor",
        "config": {"tokenizer_name": "x"},
    },
    "step that loads a model": {"registry_name": "reward_classifier_processor", "config": {}},
    "unknown name": {"registry_name": "os.system", "config": {}},
    "name that is none": {"registry_name": ["device_processor"], "config": {}},
    "nothing": {},
    "no step": "device_processor",
    "no settings": {"registry_name": "device_processor", "config": None},
    "statistics of its own": {**NORMALIZER, "config": {"stats": {"action": {"min": [1], "max": [-1]}}}},
    "other settings": {"registry_name": "device_processor", "config": {"device": "cpu", "x": 1}},
    "other entries": {**NORMALIZER, "state": "x"},
    "state elsewhere": {**NORMALIZER, "state_file": "../state.safetensors"},
    "state at a path": {**NORMALIZER, "state_file": "/etc/passwd"},
    "state behind a link": {**NORMALIZER, "state_file": "link.safetensors"},
    "state that is none": {**NORMALIZER, "state_file": 3},
}


def hostile_checkpoint(folder: Path, step: object, file: str) -> Path:
    """With `step` in place of the one that it pretends to be, or of the device's."""
    shutil.copytree(V1, folder)
    (folder / "link.safetensors").symlink_to(V1 / "model.safetensors")
    content = json.loads((folder / file).read_text())
    names = [saved["registry_name"] for saved in content["steps"]]
    name = step.get("registry_name") if isinstance(step, dict) else None
    if name == "normalizer_processor" and "post" in file:
        name, step = "unnormalizer_processor", {**step, "registry_name": "unnormalizer_processor"}
    content["steps"][names.index(name if name in names else "device_processor")] = step
    (folder / file).write_text(json.dumps(content))
    return folder


def tampered_export(folder: Path) -> str:
    """The checkpoint in an export that was tampered with. Of the model there is nothing."""
    (folder / "export").mkdir()
    files = {f.name: json.loads(f.read_text()) for f in folder.glob("*.json")}
    spec = {"spec_version": 1, "checkpoint": {"files": files, "state": {}}}
    (folder / "export/action_spec.json").write_text(json.dumps(spec))
    return str(folder / "export")


DOORS = {
    "policy": VLA0Policy.from_pretrained,
    "policy on a server": lambda folder: VLA0Policy.from_pretrained(
        folder, config=config_of(folder, server="http://x")
    ),
    "base of an adapter": lambda folder: VLA0Policy.from_pretrained(
        folder, config=config_of(folder, use_peft=True, pretrained_path=str(V1))
    ),
    "adapter": lambda folder: VLA0Policy.from_pretrained(
        V1, config=config_of(folder, use_peft=True, pretrained_path=str(folder))
    ),
    "agent": Agent.from_pretrained,
    "processors": lambda folder: load_processors(config_of(folder), folder),
    "export": lambda folder: main(["export", f"--policy.path={folder}", f"--out={folder}/new"]),
    "import": lambda folder: main(["import", f"--from={tampered_export(folder)}", f"--out={folder}/new"]),
    "bench": lambda folder: main(
        ["bench", "decode", f"--model={folder}", "--dataset=x", f"--out={folder}/new"]
    ),
}  # fmt: skip


def config_of(folder: Path, **fields):
    config = PreTrainedConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_step(name, file, tmp_path):
    folder = hostile_checkpoint(tmp_path / "checkpoint", HOSTILE[name], file)
    with pytest.raises(ValueError, match=rf"{folder}/{file}( has the steps|: the step| names| is damaged)"):
        VLA0Policy.from_pretrained(folder)


@pytest.mark.parametrize("door", DOORS)
def test_hostile_step_at_every_door(door, tmp_path):
    folder = hostile_checkpoint(tmp_path / "checkpoint", HOSTILE["function"], "policy_preprocessor.json")
    with pytest.raises((ValueError, SystemExit), match=r"policy_preprocessor.json has the steps.*os.system"):
        DOORS[door](folder)


def test_left_out_and_doubled_steps(tmp_path):
    for number, change in enumerate((lambda s: s.pop(), lambda s: s.append(s[1]), lambda s: s.reverse())):
        folder = shutil.copytree(V1, tmp_path / str(number))
        content = json.loads((folder / "policy_postprocessor.json").read_text())
        change(content["steps"])
        (folder / "policy_postprocessor.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="policy_postprocessor.json has the steps"):
            VLA0Policy.from_pretrained(folder)


def test_a_vlm_that_is_a_policy_too(tmp_path):
    """The processors of a bare VLM are not looked for; its config must not make LeRobot look for them."""
    folder = hostile_checkpoint(tmp_path / "x", HOSTILE["function"], "policy_preprocessor.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_5_vl"}))
    with pytest.raises(ValueError, match="has the steps"):
        VLA0Policy.from_pretrained(folder, config=config_of(V1))


def test_processors_of_the_newest_commit(tmp_path, monkeypatch):
    """lerobot-eval loads them, whatever revision the policy has."""
    evil = hostile_checkpoint(tmp_path / "evil", HOSTILE["function"], "policy_postprocessor.json")
    at = {"v1": V1, None: evil}
    monkeypatch.setattr(module, "hf_hub_download", lambda _, file, revision=None: at[revision] / file)
    monkeypatch.setattr(module, "snapshot_download", lambda _, revision, **k: at[revision])
    with pytest.raises(ValueError, match="evil/policy_postprocessor.json has the steps"):
        VLA0Policy.from_pretrained("them/policy", revision="v1")
    at[None] = tmp_path / "gone"
    assert VLA0Policy.from_pretrained("them/policy", revision="v1")


@pytest.mark.parametrize(
    ("module", "function", "policy"),
    [
        ("lerobot.scripts.lerobot_train", "train", "policy = make_policy("),
        ("lerobot.scripts.lerobot_eval", "eval_main", "policy = make_policy("),
        ("lerobot.rollout.context", "build_rollout_context", "_load_pretrained_policy("),
        ("lerobot.async_inference.policy_server", "SendPolicyInstructions", "policy_class.from_pretrained("),
    ],
)
def test_lerobot_loads_the_policy_before_its_processors(module, function, policy):
    text = Path(find_spec(module).origin).read_text()
    body = text[text.index(f"def {function}(") :]
    assert 0 < body.index(policy) < body.index("make_pre_post_processors(")


def test_a_file_that_is_none(tmp_path):
    for number, name in enumerate(
        ("config.json", "policy_preprocessor.json", "vlm/tokenizer.json", "x.json")
    ):
        folder = shutil.copytree(V1, tmp_path / str(number))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{folder / name} is a pipe"):
            VLA0Policy.from_pretrained(folder)
        with pytest.raises(SystemExit, match=f"{folder / name} is a pipe"):
            main(["card", f"--policy.path={folder}"])
        with pytest.raises(SystemExit, match=f"{folder / name} is a pipe"):
            main(["import", f"--from={folder}", f"--out={tmp_path}/new"])


DAMAGE = {
    "empty": b"",
    "cut": b'{"steps": [',
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "another object": b'{"a": 1}',
    "depth": b"[" * 100_000,
    "wrong types": b'{"steps": 3, "type": [], "model_type": {}, "added_tokens": 3, "chat_template": 7}',
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", sorted(str(f.relative_to(V1)) for f in V1.rglob("*") if f.is_file()))
def test_damaged_file(file, damage, tmp_path):
    folder = shutil.copytree(V1, tmp_path / "checkpoint")
    (folder / file).write_bytes(DAMAGE[damage])
    try:
        Agent.from_pretrained(folder)
    except (ValueError, FileNotFoundError, DecodingError) as error:
        assert str(folder) in str(error) or "chat template" in str(error) or "vlm:" in str(error)
    else:  # a file that is not needed, or that may hold what it likes
        assert file.startswith("vlm/") or file == "expected.json"
