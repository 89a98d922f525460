"""Statistics of the actions as other implementations of VLA-0 save them: a pickle or JSON.

A pickle is a program, which may name any function and call it. Here a small interpreter reads it, which knows
containers, numbers, and how NumPy writes an array; it calls nothing that the file names.
"""

import json
import math
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATS = "out_ori_act"  # all three implementations write this entry: {"min": [...], "max": [...], ...}
# Limits on memory and time. NVlabs' file for 7 dimensions has 403 bytes.
MAX_FILE, MAX_ARRAY, MAX_CALLS = 100_000, 65_536, 1_000  # bytes, bytes, number

# What pickles of NumPy arrays and numbers name, written by NumPy 1 or 2.
MODULE = r"numpy\.(?:core|_core)\."
NAMES = {
    MODULE + "multiarray _reconstruct": "array",
    MODULE + "multiarray scalar": "scalar",
    MODULE + "numeric _frombuffer": "buffer",  # pickle protocol 5
    "numpy ndarray": "class",
    "numpy dtype": "type",
    "_codecs encode": "bytes",  # pickle protocols 0 to 2
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Instructions that push their argument: a number, a text or bytes.
PUSH = re.compile("(BIN|LONG|SHORT_BIN)?(INT|LONG|FLOAT|STRING|UNICODE|BYTES)[1248]?|LONG[14]|BYTEARRAY8")


@dataclass
class _Function:
    """Stands for what a pickle names: a value of NAMES."""

    name: str


@dataclass
class _Array:
    """Stands for an array, whose numbers may come later."""

    values: np.ndarray | None = None


@dataclass
class _Type:
    """Stands for a NumPy type: its code, such as "f8", and its byte order."""

    code: str
    order: str = "="


def _numbers(raw: bytes, kind: _Type, shape: tuple[Any, ...]) -> np.ndarray:
    if not re.fullmatch("f[248]|[iu][1248]", kind.code) or kind.order not in tuple("<>=|"):
        raise ValueError(f"an array of type {kind.code[:20]!r}")
    kind = np.dtype(kind.code).newbyteorder(kind.order)
    if len(raw) > MAX_ARRAY or not all(type(n) is int and 0 <= n <= MAX_ARRAY for n in shape):
        raise ValueError(f"an array of more than {MAX_ARRAY} bytes")
    if len(shape) > 8 or len(raw) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array whose shape does not fit its {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape)


def _call(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, _Function) else type(function).__name__
    match name, arguments:
        case "array", tuple():
            return _Array()
        case "type", (str(code), *_):
            return _Type(code)
        case "scalar", (_Type() as kind, bytes() as raw):
            return _numbers(raw, kind, ()).item()
        case "buffer", (bytes() | bytearray() as raw, _Type() as kind, tuple(shape), _):
            return _Array(_numbers(bytes(raw[: MAX_ARRAY + 1]), kind, shape))
        case "bytes", (str(text), "latin1") if len(text) <= MAX_ARRAY:
            return text.encode("latin-1")
    raise ValueError(f"it calls {name!r} as NumPy does not")


def _set_state(target: Any, state: Any) -> None:
    match target, state:
        case _Type(), (int(), str(order), *_):
            target.order = order
        case _Array(), (int(), tuple(shape), _Type() as kind, _, bytes() as raw):
            target.values = _numbers(raw, kind, shape)
        case _:
            raise ValueError(f"it sets the state of a {type(target).__name__} as NumPy does not")


def _set_items(target: Any, items: list[Any]) -> Any:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:  # the hash of a nested tuple may take for ever
            raise ValueError(f"a key that is a {type(key).__name__}")
        target[key] = value
    return target


class StatsUnpickler:
    """Reads dicts with keys of text, lists, tuples, texts, numbers, and NumPy arrays (as `_Array`).

    What comes back may hold a list many times over, so it must not be printed, copied or compared as a whole.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.calls = 0

    def load(self, data: bytes) -> Any:
        """Raises ValueError if the pickle is damaged or holds anything else."""
        try:
            for instruction, argument, _ in pickletools.genops(data):
                if instruction.name == "STOP":
                    return self.stack.pop()
                self.step(instruction.name, argument)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(str(error)[:200] or type(error).__name__) from error
        raise ValueError("it has no end")

    def items(self) -> list[Any]:
        """Takes off what lies above the last mark, and the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if PUSH.fullmatch(name):
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"DICT": {}, "LIST": [], "TUPLE": ()}[name[6:]])
        elif name in ("DICT", "LIST", "TUPLE"):
            items = self.items()
            if name == "DICT":
                items = _set_items({}, items)
            self.stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            self.fill([stack.pop() for _ in range(count)][::-1], list if count == 1 else dict)
        elif name in ("APPENDS", "SETITEMS"):
            self.fill(self.items(), list if name == "APPENDS" else dict)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = argument or " ".join([stack.pop(), stack.pop()][::-1])
            found = next((value for key, value in NAMES.items() if re.fullmatch(key, named)), None)
            if found is None:
                raise ValueError(f"it asks for {named.replace(' ', '.')}")
            stack.append(_Function(found))
        elif name in ("REDUCE", "BUILD"):
            self.calls += 1
            if self.calls > MAX_CALLS:
                raise ValueError(f"it makes more than {MAX_CALLS} calls")
            state = stack.pop()
            if name == "BUILD":
                _set_state(stack[-1], state)
            else:
                stack.append(_call(stack.pop(), state))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {name}, which no pickle of numbers has")

    def fill(self, items: list[Any], kind: type) -> None:
        target = self.stack[-1]
        if type(target) is not kind:
            raise ValueError(f"items of a {type(target).__name__}")
        target.extend(items) if kind is list else _set_items(target, items)


def _vector(value: Any) -> np.ndarray:
    """float32 of an array, or of a flat list of numbers."""
    if isinstance(value, _Array) and value.values is not None:
        value = value.values
    elif not isinstance(value, list | tuple) or not all(type(n) in (int, float) for n in value):
        raise TypeError(f"{type(value).__name__} that is not a flat list of numbers")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which is refused
        return np.asarray(value, dtype=np.float32)


def read_stats(file: Path) -> dict[str, torch.Tensor]:
    """`min` and `max` of the actions, float32 (D,) each, from a dataset_stats.pkl or .json.

    Raises:
        ValueError: not the layout of either, not finite, or a pickle that holds more than numbers.
    """
    with open(file, "rb") as stream:
        data = stream.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{file} has more than {MAX_FILE} bytes: too many for statistics of actions.")
    if file.suffix == ".json":
        try:
            stats = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no JSON ({error}).") from error
    else:
        try:
            stats = StatsUnpickler().load(data)
        except ValueError as error:
            raise ValueError(
                f"{file} is no pickle of plain numbers and NumPy arrays ({error}): it was not read further."
            ) from error
    actions = stats.get(STATS) if isinstance(stats, dict) else None
    if not isinstance(actions, dict) or not {"min", "max"} <= actions.keys():
        names = actions if isinstance(actions, dict) else stats
        shown = sorted(names)[:10] if isinstance(names, dict) else type(stats).__name__
        raise ValueError(
            f"{file}: expected {{{STATS!r}: {{'min': [...], 'max': [...]}}}}, found {str(shown)[:500]}."
        )
    try:
        low, high = _vector(actions["min"]), _vector(actions["max"])
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: min and max of {STATS!r} are no lists of numbers ({error}).") from error
    flat = low.ndim == 1 and low.shape == high.shape and low.size
    if not flat or not np.isfinite([low, high]).all() or (low > high).any():
        raise ValueError(
            f"{file}: min and max of {STATS!r} must be two lists of finite numbers, as long as the action "
            f"and min not above max; got {str(low.tolist())[:200]} and {str(high.tolist())[:200]}."
        )
    return {"min": torch.from_numpy(low), "max": torch.from_numpy(high)}
