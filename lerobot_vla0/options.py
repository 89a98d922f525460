"""Options of the commands: draccus, LeRobot's parser, with LeRobot's `--policy.path=`."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import draccus
import yaml
from draccus.utils import DecodingError, ParsingError
from lerobot.configs import PreTrainedConfig, parser

from .configuration_vla0 import VLA0Config
from .files import read_json


@dataclass(kw_only=True)
class PolicyOptions:
    """Base of the configs of commands that take `--policy.path=`, a checkpoint folder or a Hub repo, and
    `--policy.<field>=` to override its config.

    Attributes:
        policy: the checkpoint's config with the overrides, its `pretrained_path` set; None without
            `--policy.path=`.
    """

    policy: PreTrainedConfig | None = None

    def __post_init__(self) -> None:
        # From sys.argv, as LeRobot's own configs do: draccus does not pass on the options of a path.
        path = parser.get_path_arg("policy")
        if path:
            self.policy = load_policy_config(path, parser.get_cli_overrides("policy") or [])

    def require_policy(self, question: str) -> VLA0Config:
        """The policy's config.

        Args:
            question: what to ask if no policy was named.

        Raises:
            ValueError: none was named, or one of another type.
        """
        if self.policy is None:
            raise ValueError(f"{question} --policy.path=<checkpoint folder or Hub repo>")
        if not isinstance(self.policy, VLA0Config):
            raise ValueError(
                f"--policy.path={self.policy.pretrained_path} holds a {self.policy.type!r} policy, not vla0: "
                "this command works on checkpoints of this package only."
            )
        return self.policy

    @classmethod
    def __get_path_fields__(cls) -> list[str]:
        return ["policy"]  # LeRobot's parser takes `--policy.path=` for these


def load_policy_config(
    path: str | Path, overrides: Sequence[str] = (), revision: str | None = None
) -> VLA0Config:
    """The config of a checkpoint folder or Hub repo, its `pretrained_path` set.

    Args:
        overrides: changed fields, as on a command line: "--device=cpu"; see `override_arguments`.
        revision: of a Hub repo.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is no VLA-0 policy, or the config refuses a value.
    """
    from .checkpoint import find_config  # imports transformers, which `--help` must not

    file = find_config(path, revision=revision)
    # Where the file is missing, LeRobot says so below.
    saved = read_json(file) if file.is_file() else {"type": "vla0"}
    if saved.get("type") != "vla0":
        kind = f"a {saved['type']!r} policy, not vla0" if "type" in saved else "no policy"
        raise ValueError(f"{path} holds {kind}. Give --policy.path a checkpoint of VLA-0.")
    with _errors_of_configs():
        config = PreTrainedConfig.from_pretrained(
            path, revision=revision, cli_overrides=[_as_json(argument) for argument in overrides]
        )
    config.pretrained_path = Path(path)
    return config


def override_arguments(values: Mapping[str, Any]) -> list[str]:
    """Changed fields of a saved config, {field: value}, as arguments of `PreTrainedConfig.from_pretrained`,
    which reads their values as JSON."""
    return [f"--{name}={json.dumps(value, default=draccus.encode)}" for name, value in values.items()]


def _as_json(argument: str) -> str:
    """`--field=value` or a value of its own, from YAML, as in all other options, to JSON. Strings and numbers
    are the same in both, as far as LeRobot's parser is concerned."""
    name, equals, text = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return argument
    if isinstance(value, list | dict | bool):
        return f"{name}{equals}{json.dumps(value, default=str)}"
    return argument


def parse_options[Config](config_class: type[Config], prog: str, args: list[str]) -> Config:
    """`draccus.parse`; a config with a policy may read `--policy.path=` from `sys.argv` meanwhile.

    LeRobot's own wrapper around draccus shows a traceback where a config refuses a value.

    Raises:
        ValueError: a config refuses a value.
        draccus.utils.DecodingError: a value has the wrong type; names the field.
    """
    options = args
    if hasattr(config_class, "__get_path_fields__"):
        options = parser.filter_path_args(config_class.__get_path_fields__(), args)
    with patch.object(sys, "argv", [prog, *args]), _errors_of_configs():
        return draccus.parse(config_class, args=options, prog=prog)


@contextmanager
def _errors_of_configs() -> Iterator[None]:
    """Raises the ValueError of a config's `__post_init__` itself; draccus hides its text behind one that only
    says that the config could not be made."""
    try:
        yield
    except ParsingError as error:
        # A DecodingError of a field names field, value and type already; one of the whole config is how the
        # config's ValueError passes through draccus (`config_types.reasons_shown`).
        of_a_field = isinstance(error, DecodingError) and error.key_path
        if of_a_field or not isinstance(error.__cause__, ValueError):
            raise
        raise error.__cause__ from error
