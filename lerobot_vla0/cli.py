"""`lerobot-vla0 <command> [--option=value ...]`: what LeRobot's own scripts do not do."""

import argparse
import inspect
import logging
import sys
from pkgutil import resolve_name

from draccus.utils import DraccusException
from httpx import HTTPError  # no network, as huggingface_hub reports it
from safetensors import SafetensorError
from yaml import YAMLError

from .options import parse_options

# Command: (module:function, help). The module is imported when the command runs, so `--help` answers at once.
COMMANDS = {
    "eval": ("libero.ranks:evaluate", "evaluate a policy on LIBERO as the paper does"),
    "sft": ("training.sft:main", "train with TRL's SFTTrainer, on one GPU or several"),
    "record": ("demo.record:record", "record episodes of a scripted expert"),
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
    "curve": ("demo.curve:plot_curve", "plot the loss curve of a lerobot-train log"),
    "strip": ("demo.rollout_strip:rollout_strip", "draw a rollout, the integers behind it, loss and success"),
    "tiny-vlm": ("demo.tiny_vlm:make_tiny_vlm", "write a small random Qwen2.5-VL"),
}
USAGE = "usage: lerobot-vla0 COMMAND [--option=value ...]\n\ncommands:\n" + "\n".join(
    f"  {name:12} {text}" for name, (_, text) in COMMANDS.items()
)
# What a user can mend: shown as one message, without a traceback. A mistake in a file or a value is a
# ValueError or a parser's own error, one in a place an OSError. KeyError, TypeError, AttributeError and the
# like keep their traceback: they are mistakes of this program. Where a damaged file could cause them, it is
# read within `files.reading`, which turns them into a ValueError that names file and field.
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
        sys.exit(1 if stop.code == 2 else stop.code)  # 2: argparse has shown its message


if __name__ == "__main__":
    main()
