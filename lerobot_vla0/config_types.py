"""The config's types, how they are read from files and the command line, and what its features must be."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import draccus
import torch
from draccus.parsers import decoding
from draccus.parsers.config_parsers import YAMLParser
from draccus.utils import DecodingError
from lerobot.configs import NormalizationMode, PreTrainedConfig

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


class Regions(dict[str, list[float]]):
    """{image key: part of its picture}, a dict that may be YAML text."""


def _from_yaml(plain: type) -> Callable[[object, Sequence[str]], object]:
    read = decoding.get_decoding_fn(plain)
    return lambda raw, path: read(YAMLParser.parse_string(raw) if isinstance(raw, str) else raw, path)


draccus.decode.register(Names, _from_yaml(list[str]))
draccus.decode.register(Normalizations, _from_yaml(dict[str, NormalizationMode]))
draccus.decode.register(Regions, _from_yaml(dict[str, list[float]]))


def is_region(region: Sequence[float]) -> bool:
    """Whether it is [top, left, height, width], in shares of a picture, and lies in the picture."""
    if len(region) != 4 or not all(0 <= share <= 1 for share in region):
        return False
    top, left, height, width = region
    return height > 0 and width > 0 and top + height <= 1 and left + width <= 1


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


def check_features(config: PreTrainedConfig) -> None:
    """Raises ValueError if the features that LeRobot fills in from the data set or environment do not fit a
    VLA0Config: no vector of actions, no camera of three colours, or no state where it is needed."""
    inputs, outputs = sorted(config.input_features or {}), sorted(config.output_features or {})
    if config.action_feature is None:
        raise ValueError(f"VLA-0 needs an `action` feature; the data set or environment has {outputs}.")
    if len(config.action_feature.shape) != 1:
        raise ValueError(f"action must be a vector, got shape {tuple(config.action_feature.shape)}.")
    present = sorted(config.image_features)
    if not present:
        raise ValueError(
            f"VLA-0 needs at least one camera: no image feature among {inputs}. Use a data set or "
            "environment with images."
        )
    for name, there in (("cameras", present), ("camera_regions", config.camera_keys)):
        if unknown := [key for key in getattr(config, name) or [] if key not in there]:
            value = getattr(config, name)
            raise ValueError(f"{name}={value!r} names {unknown}, which are not there. Present: {there}.")
    shapes = {key: tuple(config.image_features[key].shape) for key in config.camera_keys}
    bad = [key for key, shape in shapes.items() if 3 not in (shape[0], shape[-1])]
    if bad:
        colour = [key for key in shapes if key not in bad]
        raise ValueError(
            f"the camera {bad[0]} has shape {shapes[bad[0]]}: a depth or grey camera cannot be shown. "
            f"Choose the others with --policy.cameras='[{', '.join(colour)}]'."
        )
    for name in ("use_state", "use_relative_actions"):
        if getattr(config, name) and config.robot_state_feature is None:
            raise ValueError(
                f"{name}=True needs the feature observation.state; present are {inputs}. Set {name}=false."
            )
    size, has = (f.shape[0] if f else 0 for f in (config.action_feature, config.robot_state_feature))
    if config.use_relative_actions and not 2 <= size <= has:
        raise ValueError(
            f"use_relative_actions=True subtracts the {has} numbers of observation.state from an action of "
            f"{size}: it needs 2 or more, and as many of the state. Set use_relative_actions=false."
        )


def check_joints(config: PreTrainedConfig, state: int) -> None:
    """Refuses a robot with fewer joints than the policy moves: LeRobot would leave out the last dimensions of
    each action, with a warning at most. Environments may have another state than the training data; only one
    that has become too short for the action tells of another robot.

    Args:
        config: of the policy, with its features filled in.
        state: numbers of `observation.state` where the policy acts.

    Raises:
        ValueError: see above.
    """
    size, had = (f.shape[0] if f else 0 for f in (config.action_feature, config.robot_state_feature))
    if state < size <= had:
        raise ValueError(
            f"the robot has {state} joints (observation.state), and the policy writes actions of {size} "
            f"dimensions: it was trained on a robot with {had}. Use that robot, or train on data of this one."
        )
