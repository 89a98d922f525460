import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import make_config
from draccus.utils import DecodingError
from lerobot.configs import NormalizationMode

from lerobot_vla0.checkpoint import load_policy_config, override_arguments
from lerobot_vla0.cli import COMMANDS, PolicyOptions, main, parse_options


def test_help_lists_every_command(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_documents_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: lerobot-vla0 {name}" in shown and ("--out" in shown or "--trainer.output_dir" in shown)


def test_help_is_light():
    """`lerobot-vla0 --help` imports neither transformers nor a simulator."""
    code = (
        "import sys; from lerobot_vla0.cli import main; main([]); "
        "print({'transformers', 'libero'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("set()")


def test_mistakes_of_the_program_keep_their_traceback(monkeypatch, tmp_path):
    for error in (KeyError("a"), AttributeError("b"), NotImplementedError("c")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr("lerobot_vla0.cli.parse_options", fail)
        with pytest.raises(type(error)):
            main(["merge", f"--out={tmp_path}"])


# ---------------------------------------------------------------- options of commands with a policy


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
    argv = list(sys.argv)
    path = ["--policy.path", str(checkpoint)]
    options = parse_options(Options, "prog", ["--count=3", *path, "--policy.n_action_steps=2"])
    policy = options.policy
    assert (options.count, policy.chunk_size, policy.n_action_steps) == (3, 4, 2)
    assert policy.pretrained_path == checkpoint
    assert sys.argv == argv
    assert parse_options(Options, "prog", []).policy is None and Options().policy is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--count=0"], ValueError, "count=0 must be at least 1"),
        (["--count=many"], DecodingError, "`count`: Couldn't parse 'many' into an int"),
        (["--policy.chunk_size=0"], DecodingError, "chunk_size=0 is not allowed"),
        (["--policy.chunk_size=many"], DecodingError, "`chunk_size`: Couldn't parse 'many' into an int"),
    ],
)
def test_errors_name_field_and_value(arguments, error, message, checkpoint):
    with pytest.raises(error, match=message):
        parse_options(Options, "prog", [f"--policy.path={checkpoint}", *arguments])


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("[b, a]", "cameras", ["b", "a"]),
        ("null", "default_task", None),
        ("true", "use_state", True),
        ("1e-5", "optimizer_lr", 1e-5),
        ("0123456", "vlm_revision", "0123456"),
        ("a: b: c", "server_model", "a: b: c"),
    ],
)
def test_values_are_read_as_yaml_beside_a_path(text, field, value, checkpoint):
    for pair in ([f"--policy.{field}={text}"], [f"--policy.{field}", text]):
        policy = parse_options(Options, "prog", [f"--policy.path={checkpoint}", *pair]).policy
        assert getattr(policy, field) == value and type(getattr(policy, field)) is type(value)


def test_python_values_come_back_as_they_are(checkpoint):
    mapping = {"VISUAL": "IDENTITY", "STATE": NormalizationMode.QUANTILES, "ACTION": "QUANTILES"}
    values = {"default_task": None, "cameras": ["b", "a"], "normalization_mapping": mapping}
    values |= {"server_model": "null", "jitter": [0.1, 0.1, 0.1, 0.0], "use_state": True}
    config = load_policy_config(checkpoint, override_arguments(values))
    for name, value in values.items():
        assert getattr(config, name) == value, name


def test_path_without_a_policy(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_policy_config(tmp_path)
    for name in ("no such folder", "outputs/no/such/folder"):
        with pytest.raises(FileNotFoundError, match=f"'{name}' is neither a folder nor a Hub repo"):
            load_policy_config(name)
    (Path(tmp_path) / "config.json").write_text(json.dumps({"type": "of_a_plugin_that_is_not_there"}))
    with pytest.raises(ValueError, match="of_a_plugin_that_is_not_there"):
        load_policy_config(tmp_path)
