"""Types of the config's fields, and how they are read from files and from the command line."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import draccus
import torch
from draccus.parsers import decoding
from draccus.parsers.config_parsers import YAMLParser
from draccus.utils import DecodingError
from lerobot.configs import NormalizationMode

# Data types of weights and computation, by their names in a config.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

IDENTITY, MIN_MAX = NormalizationMode.IDENTITY, NormalizationMode.MIN_MAX
# Integers need a bounded range. Images are normalised by the VLM's own image processor.
BOUNDED = (MIN_MAX, NormalizationMode.QUANTILES, NormalizationMode.QUANTILE10)
NORMALIZATIONS = {"STATE": BOUNDED, "ACTION": BOUNDED, "VISUAL": (IDENTITY,)}


class FormatVersion(int):
    """A type of its own, so that a newer version is refused before the reading of config.json comes to the
    fields that the newer version has added."""


# Raised when a checkpoint of this package could no longer be read, or would act otherwise, in an older one.
# Adding a field does not count: an older version refuses a field that it does not know by name.
FORMAT_VERSION = FormatVersion(1)


@draccus.decode.register(FormatVersion)
def _read_format_version(raw: object, path: Sequence[str]) -> FormatVersion:
    if not isinstance(raw, int) or raw < 1:
        raise DecodingError(path, f"{raw!r} is not allowed: it must be an integer from 1.")
    if raw > FORMAT_VERSION:
        raise DecodingError(
            path,
            f"version {raw} was written by a newer lerobot_policy_vla0; the one that is installed reads up "
            f"to {FORMAT_VERSION}. Upgrade: pip install --upgrade lerobot_policy_vla0",
        )
    return FormatVersion(raw)


class Names(list[str]):
    """Strings, as a list or as YAML text: with `--policy.path=` LeRobot reads JSON, and leaves '[a, b]'."""


class Normalizations(dict[str, NormalizationMode]):
    """A dict that may be YAML text."""


def _from_yaml(plain: type) -> Callable[[object, Sequence[str]], object]:
    read = decoding.get_decoding_fn(plain)
    return lambda raw, path: read(YAMLParser.parse_string(raw) if isinstance(raw, str) else raw, path)


draccus.decode.register(Names, _from_yaml(list[str]))
draccus.decode.register(Normalizations, _from_yaml(dict[str, NormalizationMode]))


@contextmanager
def reasons_shown() -> Iterator[None]:
    """Around the checks of a config. draccus hides the text of a ValueError ("Couldn't instantiate class"),
    but not that of its own error: it gets that one, and Python callers the ValueError."""
    try:
        yield
    except ValueError as error:
        if any(caller.filename == decoding.__file__ for caller in inspect.stack(context=0)):
            raise DecodingError((), str(error)) from error
        raise
