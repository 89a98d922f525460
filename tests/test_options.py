import sys
from dataclasses import dataclass

import pytest
from conftest import make_config
from draccus.utils import DecodingError

from lerobot_vla0.options import PolicyOptions, load_policy_config, parse_options


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
