"""Statistics of the actions as other implementations of VLA-0 save them: a pickle or JSON."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATS = "out_ori_act"  # all three implementations write this entry: {"min": [...], "max": [...], ...}

# Functions and classes by which pickles of NumPy arrays and numbers are rebuilt, by NumPy 1 and 2.
NUMPY = {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}
NUMPY |= {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}  # pickle protocol 5
ALLOWED = NUMPY | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class StatsUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers and NumPy arrays only. Reading a pickle calls the functions that it names,
    of any module; here those in ALLOWED can be called, and any other is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_stats(file: Path) -> dict[str, torch.Tensor]:
    """`min` and `max` of the actions, float32 (D,) each, from a dataset_stats.pkl or .json.

    Raises:
        ValueError: not the layout of either, not finite, or a pickle that holds more than numbers.
    """
    try:
        if file.suffix == ".json":
            stats = json.loads(file.read_text())
        else:
            with open(file, "rb") as stream:
                stats = StatsUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no pickle of plain numbers and NumPy arrays ({error}), so it was not read further."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}).") from error
    actions = stats.get(STATS) if isinstance(stats, dict) else None
    if not isinstance(actions, dict) or not {"min", "max"} <= actions.keys():
        shown = sorted(map(str, actions if isinstance(actions, dict) else stats))[:10] if stats else stats
        raise ValueError(
            f"{file}: expected {{{STATS!r}: {{'min': [...], 'max': [...]}}}}, found "
            f"{shown if isinstance(stats, dict) else type(stats).__name__}."
        )
    try:
        low, high = (np.asarray(actions[name], dtype=np.float32) for name in ("min", "max"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: min and max of {STATS!r} are no lists of numbers ({error}).") from error
    if low.ndim != 1 or low.shape != high.shape or not np.isfinite([low, high]).all() or (low > high).any():
        raise ValueError(
            f"{file}: min and max of {STATS!r} must be two lists of finite numbers, as long as the action "
            f"and min not above max; got {low.tolist()} and {high.tolist()}."
        )
    return {"min": torch.from_numpy(low), "max": torch.from_numpy(high)}
