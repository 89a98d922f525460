"""Checkpoints of earlier and later versions, of strangers, and of two trainings."""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from draccus.utils import DecodingError
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file

from lerobot_vla0 import Agent
from lerobot_vla0 import checkpoint as module
from lerobot_vla0.cli import main
from lerobot_vla0.configuration_vla0 import FORMAT_VERSION
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import load_processors

# A policy of version 0.1.0 with random weights, pushed as it is: never written anew. expected.json holds what
# it answered then.
V1 = ROOT / "tests/data/checkpoint_v1"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"


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
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(V1, tmp_path / "checkpoint")


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def config_of(folder: Path, **fields):
    return replace(PreTrainedConfig.from_pretrained(folder), **fields)


def test_newer_format(checkpoint):
    message = "format_version=.* is not allowed.*pip install --upgrade lerobot_policy_vla0"
    edit(checkpoint / "config.json", lambda c: c.update(format_version=FORMAT_VERSION + 1))
    for load in (PreTrainedConfig.from_pretrained, VLA0Policy.from_pretrained):
        with pytest.raises(DecodingError, match=message):
            load(checkpoint)
    edit(checkpoint / "config.json", lambda c: c.pop("format_version"))
    assert VLA0Policy.from_pretrained(checkpoint).config.format_version == 1


# ----------------------------------------------------------------------------- what would act silently wrong


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bins": 255}, "num_bins=255 differs from the checkpoint's 1000"),
        ({"action_norm": "task"}, "action_norm='task' differs from the checkpoint's 'dataset'"),
        ({"relative_exclude_joints": ["a"]}, r"relative_exclude_joints=\['a'\] differs"),
        ({"output_features": None}, "action has 2 dimensions here, but the checkpoint .* was trained with 3"),
    ],
)
def test_overrides_that_change_what_integers_mean(fields, message):
    config = config_of(V1)
    if "output_features" in fields:
        fields["output_features"] = {"action": replace(config.action_feature, shape=(2,))}
    with pytest.raises(ValueError, match=message):
        VLA0Policy.from_pretrained(V1, config=replace(config, **fields))


NAN = float("nan")


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize(
    ("low", "high"), [([NAN, 0.0, 0.0], [1.0] * 3), ([0.0, 1.0, 0.0], [1.0, 0.0, 1.0]), ([-1.0], [1.0])]
)
def test_statistics(low, high, kind, checkpoint):
    file = next(checkpoint.glob(f"policy_{kind}processor_step_*.safetensors"))
    save_file({"action.min": torch.tensor(low), "action.max": torch.tensor(high)}, file)
    with pytest.raises(ValueError, match=f"policy_{kind}processor.json: 'action' has min=.*3 finite numbers"):
        VLA0Policy.from_pretrained(checkpoint)


def test_processors_of_two_trainings(checkpoint):
    file = next(checkpoint.glob("policy_preprocessor_step_*.safetensors"))
    tensors = load_file(file)
    save_file(tensors | {"action.max": tensors["action.max"] + 1}, file)
    with pytest.raises(ValueError, match="the two processors have different max of 'action'"):
        VLA0Policy.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("file", "step", "field", "value"),
    [
        (PRE, "vla0_action_encoder_processor", "num_bins", 255),
        (POST, "vla0_action_decoder_processor", "num_bins", None),
        (POST, "unnormalizer_processor", "eps", 5.0),
        (PRE, "normalizer_processor", "norm_map", {"ACTION": "MIN_MAX", "STATE": "MEAN_STD"}),
    ],
)
def test_settings_of_processors_agree_with_the_config(file, step, field, value, checkpoint):
    def change(content):
        (entry,) = (entry for entry in content["steps"] if entry["registry_name"] == step)
        entry["config"][field] = value

    edit(checkpoint / file, change)
    with pytest.raises(ValueError, match=f"{file}: {step}: {field}=.*and config.json asks for"):
        VLA0Policy.from_pretrained(checkpoint)


def test_checkpoint_cannot_name_a_server(checkpoint):
    edit(checkpoint / "config.json", lambda c: c.update(server="http://localhost:1/v1"))
    with pytest.raises(
        ValueError, match="names server='http://localhost:1/v1', which would see the pictures"
    ):
        VLA0Policy.from_pretrained(checkpoint)


def test_without_postprocessor_it_warns(checkpoint, caplog):
    (checkpoint / POST).unlink()
    VLA0Policy.from_pretrained(checkpoint)
    assert "policy_postprocessor.json (statistics of actions) is missing" in caplog.text


# -------------------------------------------------------------------------------------- files from strangers

MARK = Path("/tmp") / f"vla0-called-{os.getpid()}"  # made where a hostile file gets its way
NORMALIZER = {"registry_name": "normalizer_processor", "config": {}}
DEVICE = {"registry_name": "device_processor"}
NO_STEP, SETTINGS, ELSEWHERE = (
    "has the steps",
    "settings that this package does not save",
    "not in its folder",
)
HOSTILE = {
    "function": ({"class": "os.system", "config": {"command": f"touch {MARK}"}}, NO_STEP),
    "own function": ({"class": "lerobot_vla0.files.new_folder", "config": {"out": str(MARK)}}, NO_STEP),
    "own class under another name": ({"class": "lerobot_vla0.dataset.field", "config": {}}, NO_STEP),
    "name and class": ({**DEVICE, "class": "os.system", "config": {}}, NO_STEP),
    "no name and class": ({"registry_name": None, "class": "os.system", "config": {}}, NO_STEP),
    "step that loads a tokenizer": ({"registry_name": "tokenizer_processor", "config": {}}, NO_STEP),
    "no step": (3, "is damaged"),
    "no settings": ({**DEVICE, "config": None}, "is damaged"),
    "statistics of its own": ({**NORMALIZER, "config": {"stats": {}}}, SETTINGS),
    "other entries": ({**DEVICE, "config": {"device": "cpu", "float_dtype": None}, "state": "x"}, SETTINGS),
    "state elsewhere": ({**DEVICE, "config": {}, "state_file": "../x.safetensors"}, ELSEWHERE),
    "state at a path": ({**DEVICE, "config": {}, "state_file": "/etc/passwd"}, ELSEWHERE),
}


@pytest.fixture(autouse=True)
def nothing_is_called():
    yield
    assert not MARK.exists()


def hostile(folder: Path, name: str = "function", file: str = PRE) -> Path:
    """A checkpoint with this step in place of the one that it pretends to be, or of the device's."""
    shutil.copytree(V1, folder)
    step = HOSTILE[name][0]
    replaced = "normalizer_processor" if name == "statistics of its own" else "device_processor"

    def change(content):
        names = [step["registry_name"] for step in content["steps"]]
        content["steps"][names.index(replaced)] = step

    edit(folder / file, change)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_step(name, tmp_path):
    folder = hostile(tmp_path / "checkpoint", name)
    with pytest.raises(ValueError, match=f"{folder}/{PRE}.*{HOSTILE[name][1]}"):
        VLA0Policy.from_pretrained(folder)


def adapter_on(base: Path, folder: Path) -> Path:
    """A folder that pretends to be an adapter of a base."""
    shutil.copytree(V1, folder, dirs_exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


DOORS = {
    "policy": VLA0Policy.from_pretrained,
    "policy on a server": lambda folder: VLA0Policy.from_pretrained(
        folder, config=config_of(folder, server="http://x")
    ),
    "base of an adapter": lambda folder: VLA0Policy.from_pretrained(
        adapter_on(folder, folder.parent / "adapter")
    ),
    "adapter": lambda folder: VLA0Policy.from_pretrained(
        V1, config=config_of(folder, use_peft=True, pretrained_path=str(folder))
    ),
    "agent": Agent.from_pretrained,
    "processors": lambda folder: load_processors(config_of(folder), folder),
    "command": lambda folder: main(["export", f"--policy.path={folder}", f"--out={folder}/new"]),
}


@pytest.mark.parametrize("file", [PRE, POST])
@pytest.mark.parametrize("door", DOORS)
def test_hostile_step_at_every_door(door, file, tmp_path):
    folder = hostile(tmp_path / "checkpoint", file=file)
    with pytest.raises((ValueError, SystemExit), match=f"{file} has the steps.*os.system"):
        DOORS[door](folder)


def test_missing_doubled_and_reversed_steps(tmp_path):
    for number, change in enumerate((lambda s: s.pop(), lambda s: s.append(s[1]), lambda s: s.reverse())):
        folder = shutil.copytree(V1, tmp_path / str(number))
        edit(folder / POST, lambda content, change=change: change(content["steps"]))
        with pytest.raises(ValueError, match=f"{POST} has the steps"):
            VLA0Policy.from_pretrained(folder)


def test_processors_of_the_newest_commit(tmp_path, monkeypatch):
    """lerobot-eval loads them, whatever revision the policy has."""
    at = {"v1": V1, None: hostile(tmp_path / "evil", file=POST)}
    monkeypatch.setattr(module, "hf_hub_download", lambda _, file, revision: at[revision] / file)
    monkeypatch.setattr(module, "snapshot_download", lambda _, revision, **k: at[revision])
    with pytest.raises(ValueError, match=f"evil/{POST} has the steps"):
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
