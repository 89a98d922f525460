"""Which checkpoint a run continues from, and what of it is there already."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig

from ..checkpoint import VLM_FOLDER
from ..files import check_place


def checkpoint_to_resume(training: SFTConfig) -> Path | None:
    """Folder of the checkpoint to continue from, which is also printed; None starts afresh.

    Raises:
        FileExistsError: `output_dir` holds a run, which is not to be continued.
        FileNotFoundError: there is no complete checkpoint to continue from.
        OSError: `output_dir` cannot be written.
    """
    output = check_place(training.output_dir, "folder", "output_dir")
    wanted = str(training.resume_from_checkpoint or False)  # YAML's true is a bool
    names = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in output.glob("*")]
    found = [output / name[0] for name in sorted(filter(None, names), key=lambda name: int(name[1]))]
    if wanted.lower() in ("false", "none"):
        if (output / "final").exists() or any(map(is_complete, found)):
            raise FileExistsError(
                f"output_dir={str(training.output_dir)!r} holds a run already. Choose another one, or "
                "continue it with --resume_from_checkpoint true."
            )
        return None
    if wanted.lower() in ("true", "last"):
        while found and not is_complete(found[-1]):
            logging.warning(f"{found.pop()} is not complete: the checkpoint before it is taken.")
        if not found:
            raise FileNotFoundError(
                f"resume_from_checkpoint={wanted!r}: {str(training.output_dir)!r} holds no complete "
                "checkpoint-N."
            )
        chosen = found[-1]
    else:
        chosen = Path(wanted)
        if not is_complete(chosen):
            raise FileNotFoundError(
                f"resume_from_checkpoint={wanted!r} is no complete checkpoint of this trainer: of its files, "
                f"{TRAINER_STATE_NAME} is missing or another one is damaged. Give <output_dir>/checkpoint-N, "
                "or true for the last one."
            )
    if training.process_index == 0:
        print(f"Resuming from {chosen}, step {step_of(chosen)}")
    return chosen


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint can be continued from. `trainer_state.json` is written last; after a full disk or
    a power failure, files can be there, but empty."""
    try:
        step_of(folder)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt"):  # compares the header with the file's length
                pass
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    states = [file for file in folder.glob("*.pt*") if file.is_file()]
    return (folder / VLM_FOLDER).is_dir() and all(map(zipfile.is_zipfile, states))


def step_of(folder: Path) -> int:
    """The optimiser step at which a checkpoint was written."""
    return int(json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"])
