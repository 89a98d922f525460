"""Options of the commands: draccus, LeRobot's parser, with LeRobot's `--policy.path=`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import draccus
from draccus.utils import DecodingError, ParsingError
from lerobot.configs import PreTrainedConfig, parser


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

    @classmethod
    def __get_path_fields__(cls) -> list[str]:
        return ["policy"]  # LeRobot's parser takes `--policy.path=` for these


def load_policy_config(path: str | Path, overrides: Sequence[str] = ()) -> PreTrainedConfig:
    """The config of a checkpoint folder or Hub repo, its `pretrained_path` set.

    Args:
        overrides: changed fields, as on a command line: "--device=cpu".

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config refuses a value.
    """
    with _errors_of_configs():
        config = PreTrainedConfig.from_pretrained(path, cli_overrides=list(overrides))
    config.pretrained_path = Path(path)
    return config


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
        # A DecodingError names field, value and type already.
        if isinstance(error, DecodingError) or not isinstance(error.__cause__, ValueError):
            raise
        raise error.__cause__ from error
