import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from conftest import make_config
from draccus.utils import DecodingError
from lerobot.configs import NormalizationMode

from lerobot_vla0.cli import main
from lerobot_vla0.configuration_vla0 import VLA0Config
from lerobot_vla0.options import PolicyOptions, load_policy_config, override_arguments, parse_options


@dataclass(kw_only=True)
class Options(PolicyOptions):
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1.")


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a policy's config.json."""
    make_config("some/vlm", chunk_size=4, n_action_steps=4).save_pretrained(tmp_path)
    return tmp_path


def test_policy_is_the_checkpoints_config_with_the_overrides(checkpoint):
    path = ["--policy.path", str(checkpoint)]
    options = parse_options(Options, "prog", ["--count=3", *path, "--policy.draft_length=2"])
    policy = options.policy
    assert (options.count, policy.chunk_size, policy.draft_length) == (3, 4, 2)
    assert policy.pretrained_path == checkpoint


def test_without_a_path_there_is_no_policy(checkpoint):
    """Also after a call with a path: `sys.argv` is as before."""
    argv = list(sys.argv)
    parse_options(Options, "prog", [f"--policy.path={checkpoint}"])
    assert sys.argv == argv
    assert parse_options(Options, "prog", []).policy is None and Options().policy is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--count=0"], ValueError, "count=0 must be at least 1"),
        (["--count=many"], DecodingError, "`count`: Couldn't parse 'many' into an int"),
        (["--policy.chunk_size=0"], ValueError, "chunk_size=0 is not allowed"),
        (["--policy.chunk_size=many"], DecodingError, "`chunk_size`: Couldn't parse 'many' into an int"),
    ],
)
def test_errors_name_field_and_value(arguments, error, message, checkpoint):
    with pytest.raises(error, match=message):
        parse_options(Options, "prog", [f"--policy.path={checkpoint}", *arguments])


def test_policy_config_of_a_folder(checkpoint):
    config = load_policy_config(checkpoint, ["--draft_length=2"])
    assert (config.chunk_size, config.draft_length, config.pretrained_path) == (4, 2, checkpoint)
    with pytest.raises(ValueError, match="n_action_steps=9 "):
        load_policy_config(checkpoint, ["--n_action_steps=9"])
    with pytest.raises(FileNotFoundError, match=r"config.json not found in"):
        load_policy_config(checkpoint.parent)
    for name in ("no such folder", "outputs/no/such/folder"):
        with pytest.raises(FileNotFoundError, match=f"'{name}' is neither a folder nor a Hub repo"):
            load_policy_config(name)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("[b, a]", "cameras", ["b", "a"]),
        ('["b", "a"]', "cameras", ["b", "a"]),
        ("null", "draft_length", None),
        ("True", "stream", True),
        ("true", "stream", True),
        ("[mine, 'to share']", "tags", ["mine", "to share"]),
        ("1e-5", "optimizer_lr", 1e-5),
        ("[0.9, 0.95]", "optimizer_betas", (0.9, 0.95)),
        ("0123456", "vlm_revision", "0123456"),
        ("2024-05-01", "server_model", "2024-05-01"),
        ("a: b: c", "server_model", "a: b: c"),
    ],
)
@pytest.mark.parametrize("form", ["one argument", "two"])
def test_values_are_read_as_yaml_beside_a_path(text, field, value, form, checkpoint):
    pair = [f"--policy.{field}={text}"] if form == "one argument" else [f"--policy.{field}", text]
    policy = parse_options(Options, "prog", [f"--policy.path={checkpoint}", *pair]).policy
    assert getattr(policy, field) == value and type(getattr(policy, field)) is type(value)


def test_python_values_come_back_as_they_are(checkpoint):
    """Each default of the config, and others, through LeRobot's parser."""
    mapping = {"VISUAL": "IDENTITY", "STATE": NormalizationMode.QUANTILES, "ACTION": "QUANTILES"}
    values = {field.name: getattr(make_config("vlm"), field.name) for field in fields(VLA0Config)}
    values |= {"draft_length": None, "cameras": ["b", "a"], "stream": True, "normalization_mapping": mapping}
    values |= {"server_model": "null", "optimizer_betas": (0.5, 0.6), "pretrained_path": Path("some/where")}
    config = load_policy_config(checkpoint, override_arguments(values))
    for name, value in values.items():
        if name != "pretrained_path":
            assert getattr(config, name) == value, name


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"type": "act", "n_obs_steps": 1}, "a 'act' policy, not vla0"),
        ({"type": "of_a_plugin_that_is_not_there"}, "a 'of_a_plugin_that_is_not_there' policy, not vla0"),
        ({"model_type": "qwen2_5_vl"}, "no policy. Give"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "export", "merge", "card", "strip"])
def test_checkpoint_of_another_kind(command, content, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"lerobot-vla0 {command}: {tmp_path} holds {kind}"):
        arguments = [f"--policy.path={tmp_path}", f"--out={tmp_path}/out", "--policy.draft_length=2"]
        main([command, *arguments])
