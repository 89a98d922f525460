"""Options of the commands: draccus with LeRobot's `--policy.path=`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import draccus
from draccus.utils import DraccusException, ParsingError
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
        path = parser.get_path_arg("policy")
        if path:
            overrides = parser.get_cli_overrides("policy") or []
            self.policy = PreTrainedConfig.from_pretrained(path, cli_overrides=overrides)
            self.policy.pretrained_path = Path(path)

    @classmethod
    def __get_path_fields__(cls) -> list[str]:
        return ["policy"]  # LeRobot's parser takes `--policy.path=` for these


def parse_options(config_class: type, prog: str, args: list[str]) -> object:
    """draccus with LeRobot's `--policy.path=`, which its configs read from `sys.argv` themselves.

    Raises:
        ValueError: a config refuses a value; draccus would only say that it could not be made.
    """
    options = args
    if hasattr(config_class, "__get_path_fields__"):
        sys.argv = [prog, *args]
        options = parser.filter_path_args(config_class.__get_path_fields__(), args)
    try:
        return draccus.parse(config_class, args=options, prog=prog)
    except ParsingError as error:
        if isinstance(error.__cause__, ValueError) and not isinstance(error.__cause__, DraccusException):
            raise error.__cause__ from error
        raise
