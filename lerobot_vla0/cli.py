"""`lerobot-vla0 <command> [--option=value ...]`: what LeRobot's own scripts do not do."""

import argparse
import inspect
import logging
import sys
from dataclasses import dataclass
from pkgutil import resolve_name
from unittest.mock import patch

import draccus
from draccus.utils import DecodingError, DraccusException, ParsingError
from httpx import HTTPError  # no network, as huggingface_hub reports it
from lerobot.configs import PreTrainedConfig, parser
from safetensors import SafetensorError
from yaml import YAMLError

from .configuration_vla0 import VLA0Config

# Command: (module:function, help). The module is imported when the command runs, so `--help` answers at once.
COMMANDS = {
    "eval": ("libero.evaluate:main", "evaluate a policy on LIBERO as the paper does"),
    "sft": ("training.sft:sft", "train with TRL's SFTTrainer, on one GPU or several"),
    "bench decode": ("bench.decode:bench_decode", "measure decoding against Transformers' generate"),
    "bench train": ("bench.train:bench_train", "measure a training step against sample by sample"),
    "bench eval": ("bench.eval:bench_eval", "measure episodes of LIBERO per minute"),
    "merge": ("convert.merge:merge", "fold a LoRA adapter into a full checkpoint"),
    "import": (
        "convert.import_checkpoint:main",
        "import a checkpoint of NVlabs/vla0, vla0-trl or TinyVLA, or an export",
    ),
    "card": ("convert.card:write_card", "write the model card of a checkpoint"),
    "export": ("convert.export:export", "write a plain Transformers folder for serving engines"),
}
USAGE = "usage: lerobot-vla0 COMMAND [--option=value ...]\n\ncommands:\n" + "\n".join(
    f"  {name:12} {text}" for name, (_, text) in COMMANDS.items()
)
# Mistakes of the user, which end a command with one message. Others (KeyError, TypeError, ...) are mistakes
# of this program and keep their traceback, but in a user's file `files.reading` makes them a ValueError.
USER_ERRORS = (
    argparse.ArgumentError,
    DraccusException,
    HTTPError,
    ImportError,
    OSError,
    RuntimeError,
    SafetensorError,
    ValueError,
    YAMLError,
)


def main(argv: list[str] | None = None) -> None:
    """Entry point. User errors end with their message and exit status 1."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n`lerobot-vla0 COMMAND --help` lists a command's options.")
        return
    name = next((n for n in COMMANDS if argv[: len(n.split())] == n.split()), None)
    if name is None:
        sys.exit(f"lerobot-vla0: unknown command {' '.join(argv[:2])!r}\n{USAGE}")
    options = argv[len(name.split()) :]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        function = resolve_name(f"lerobot_vla0.{COMMANDS[name][0]}")
        # The type of its only parameter: a config to be parsed, or list[str] for the options as typed.
        (parameter,) = inspect.signature(function).parameters.values()
        if parameter.annotation != list[str]:
            options = parse_options(parameter.annotation, f"lerobot-vla0 {name}", options)
        function(options)
    except NotImplementedError:
        raise  # a RuntimeError, but none that a user can mend
    except USER_ERRORS as error:
        sys.exit(f"lerobot-vla0 {name}: {error}")
    except SystemExit as stop:
        sys.exit(1 if stop.code == 2 else stop.code)  # 2: argparse has printed its message


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
        if path := parser.get_path_arg("policy"):
            from .checkpoint import load_policy_config  # imports transformers, which `--help` must not

            self.policy = load_policy_config(path, parser.get_cli_overrides("policy") or [])

    def require_policy(self, question: str) -> VLA0Config:
        """The policy's config; raises ValueError with `question` if no checkpoint was named."""
        if not isinstance(self.policy, VLA0Config):
            raise ValueError(f"{question} --policy.path=<checkpoint folder or Hub repo>")
        return self.policy

    @classmethod
    def __get_path_fields__(cls) -> list[str]:
        return ["policy"]  # LeRobot's parser takes `--policy.path=` for these


def parse_options[Config](config_class: type[Config], prog: str, args: list[str]) -> Config:
    """`draccus.parse`; a config with a policy may read `--policy.path=` from `sys.argv` meanwhile. Raises the
    ValueError of a config's `__post_init__` itself, which draccus hides behind an error of its own."""
    options = args
    if hasattr(config_class, "__get_path_fields__"):
        options = parser.filter_path_args(config_class.__get_path_fields__(), args)
    try:
        with patch.object(sys, "argv", [prog, *args]):
            return draccus.parse(config_class, args=options, prog=prog)
    except ParsingError as error:
        if isinstance(error, DecodingError) or not isinstance(error.__cause__, ValueError):
            raise
        raise error.__cause__ from None


if __name__ == "__main__":
    main()
