"""Files of users: results that are written whole or not at all; JSON and YAML, whose errors name the file."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors import SafetensorError
from yaml import YAMLError

# What a damaged file, or a missing field of it, makes its reader raise.
DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, YAMLError, SafetensorError)
DAMAGE += (AttributeError, IndexError, KeyError, TypeError, RecursionError)


def check_place(out: str | Path, kind: Literal["new folder", "folder", "file"], option: str = "out") -> Path:
    """The absolute path of a result, refused before the work if something else is there: for a "new folder"
    anything but an empty folder. `option` names it in the message."""
    place = Path(out).resolve()
    if place.is_dir() if kind == "file" else place.exists() and not place.is_dir():
        raise FileExistsError(f"{option}={str(out)!r} is there and is no {kind.split()[-1]}. Name another.")
    if kind == "new folder" and place.is_dir() and any(place.iterdir()):
        raise FileExistsError(f"{option}={str(out)!r} exists and is not empty. Choose another or remove it.")
    return place


@contextmanager
def new_folder(out: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write into, renamed to `out` when the block ends, removed if it fails. With
    `replace`, an `out` that holds files is removed when the new one is complete."""
    place = check_place(out, "folder" if replace else "new folder")
    with new_file(place) as draft:
        draft.mkdir()
        yield draft
        if replace and place.exists():
            shutil.rmtree(place)


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """A path to write a file to, moved to `out` when the block ends, removed if it fails."""
    place = Path(out).resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, because a rename needs the same file system.
    with TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as folder:
        draft = Path(folder) / place.name
        yield draft
        draft.replace(place)


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Around reading a file and taking fields from it: turns errors into a ValueError that names the file."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {reason}). Copy it again.") from error


def read_json(file: str | Path) -> dict[str, Any]:
    """The content of a file that holds a JSON object."""
    with reading(file):
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"not a JSON object but a {type(content).__name__}")
    return content


def not_found(name: str | Path, error: Exception) -> str:
    """The message where a name is no folder, and the Hub's client refused it as a repo with `error`."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))
    reason = str(error).splitlines()[0] if is_id else "there is no such folder"
    return f"{str(name)!r} is neither a folder nor a Hub repo that can be read ({reason})."


def file_inside(folder: Path, name: str, source: Path) -> Path:
    """The file `name` of a folder, as another file of it (`source`) says; refused if it leads elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{source} names {name!r}, which is not in its folder. It was not loaded.")
    return folder / name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model, whether they are there or not: those of its index, or the only one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    with reading(index):
        names = set(read_json(index)["weight_map"].values())
        return [file_inside(folder, name, index) for name in sorted(names)]
