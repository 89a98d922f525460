"""`lerobot-vla0 <command> [--option=value ...]`: what LeRobot's own scripts do not do."""

import logging
import sys
from dataclasses import dataclass
from importlib import import_module

from draccus.utils import DraccusException

from .options import parse_options


@dataclass
class Command:
    module: str  # imported only when the command runs, so that `--help` answers at once
    config: str | None  # None: the function takes the options as they were typed
    function: str
    help: str


COMMANDS = {
    "eval": Command(
        "libero.evaluate", "EvalConfig", "evaluate", "evaluate a policy on LIBERO as the paper does"
    ),
    "sft": Command("training.sft", None, "main", "train with TRL's SFTTrainer, on one GPU or several"),
    "record": Command("demo.record", "RecordConfig", "record", "record episodes of a scripted expert"),
    "bench decode": Command(
        "bench.decode", "BenchDecodeConfig", "bench_decode", "measure decoding against Transformers' generate"
    ),
    "bench train": Command(
        "bench.train", "BenchTrainConfig", "bench_train", "measure a training step against sample by sample"
    ),
    "merge": Command("convert.merge", "MergeConfig", "merge", "fold a LoRA adapter into a full checkpoint"),
    "import": Command(
        "convert.import_checkpoint",
        None,
        "main",
        "import a checkpoint of NVlabs/vla0, vla0-trl or TinyVLA, or an export",
    ),
    "card": Command("convert.card", "CardConfig", "write_card", "write the model card of a checkpoint"),
    "export": Command(
        "convert.export", "ExportConfig", "export", "write a plain Transformers folder for serving engines"
    ),
    "curve": Command("demo.curve", "CurveConfig", "plot_curve", "plot the loss curve of a lerobot-train log"),
    "strip": Command("demo.rollout_strip", "StripConfig", "rollout_strip", "draw a rollout beside its chat"),
    "tiny-vlm": Command("demo.tiny_vlm", "TinyVLMConfig", "make_tiny_vlm", "write a small random Qwen2.5-VL"),
}
USAGE = "usage: lerobot-vla0 COMMAND [--option=value ...]\n\ncommands:\n" + "\n".join(
    f"  {name:12} {command.help}" for name, command in COMMANDS.items()
)


def main(argv: list[str] | None = None) -> None:
    """Entry point. User errors end with their message and exit status 1, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n`lerobot-vla0 COMMAND --help` lists a command's options.")
        return
    name = next((n for n in COMMANDS if argv[: len(n.split())] == n.split()), None)
    if name is None:
        sys.exit(f"lerobot-vla0: unknown command {' '.join(argv[:2])!r}\n{USAGE}")
    command, options = COMMANDS[name], argv[len(name.split()) :]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    module = import_module(f"lerobot_vla0.{command.module}")
    try:
        if command.config is not None:
            options = parse_options(getattr(module, command.config), f"lerobot-vla0 {name}", options)
        getattr(module, command.function)(options)
    except (
        DraccusException,
        ValueError,
        FileExistsError,
        FileNotFoundError,
        ImportError,
        RuntimeError,
    ) as error:
        sys.exit(f"lerobot-vla0 {name}: {error}")
