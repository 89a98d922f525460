"""Checkpoints of earlier and later versions, and folders that are whole or not there."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from draccus.utils import DecodingError
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors

from lerobot_vla0.cli import main
from lerobot_vla0.configuration_vla0 import FORMAT_VERSION
from lerobot_vla0.modeling_vla0 import VLA0Policy

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
