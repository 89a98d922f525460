"""Files of users: places to write, checked before the work and written whole or not at all; JSON and YAML,
whose errors name the file and the field."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.errors import StrictDataclassError  # Transformers' configs

# What a full disk says, or a limit on it. As texts: not all writers (safetensors, tokenizers) raise OSError.
DISK_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


def check_place(out: str | Path, kind: Literal["new folder", "folder", "file"], option: str = "out") -> Path:
    """Refuses, before the work, a place where its result could not be written. Writes nothing.

    Args:
        out: the place.
        kind: "new folder": not there, or empty. "folder": may be there, and hold files. "file": may be there,
            and is replaced.
        option: that names the place, for the message.

    Returns:
        The place, as an absolute path.

    Raises:
        FileExistsError: something else is there, or in the way.
        OSError: the place cannot be written.
    """
    shown, place = f"{option}={str(out)!r}", Path(os.path.abspath(out))
    try:
        if kind == "file":
            if os.path.lexists(place) and (place.is_symlink() or not place.is_file()):
                raise FileExistsError(f"{shown} is there and is no plain file. Name another file.")
        elif os.path.lexists(place) and not place.is_dir():
            raise FileExistsError(f"{shown} is there and is no folder. Choose another folder or remove it.")
        elif kind == "new folder" and place.is_dir():
            # The result is renamed to `out`, which these do not allow.
            for wrong, what in (
                (place.is_symlink(), "a symbolic link"),
                (place.is_mount(), "a mount point"),
                (place == Path.cwd(), "the working directory"),
            ):
                if wrong:
                    raise FileExistsError(f"{shown} is {what}. Name a new folder in it.")
            if any(place.iterdir()):
                raise FileExistsError(f"{shown} exists and is not empty. Choose another folder or remove it.")
        parent = place if kind == "folder" else place.parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise FileExistsError(f"{shown} cannot be made: {parent} is no folder. Choose another one.")
        # Tried, because permissions do not tell (root, read-only file systems, quotas).
        os.rmdir(tempfile.mkdtemp(prefix=f".{place.name}-", dir=parent))
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{shown} cannot be written ({reason}). Choose another place.") from error
    return place


@contextmanager
def new_folder(out: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write into. It is renamed to `out` when the block ends, and removed if it
    fails; what a killed run left of it is removed by the next.

    Args:
        replace: `out` may be there; it is removed when the new one is complete.

    Raises:
        OSError: see `check_place`; or the disk is full.
    """
    place = check_place(out, "folder" if replace else "new folder")
    with _draft(place, out) as draft:
        draft.mkdir()
        yield draft
        if replace and place.exists():
            shutil.rmtree(place)
        draft.replace(place)


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """As `new_folder`, for a file. One that is there is replaced.

    Raises:
        OSError: see `check_place`; or the disk is full.
    """
    place = check_place(out, "file")
    with _draft(place, out) as draft:
        yield draft
        draft.replace(place)


@contextmanager
def _draft(place: Path, out: str | Path) -> Iterator[Path]:
    """A path of the same name in a new folder beside `place`, because a rename needs the same file system."""
    missing = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{place.name}-partial-"
    _remove_leftovers(place.parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not all network file systems can
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder / place.name
    except Exception as error:
        if any(text in str(error) for text in DISK_FULL):
            reason = str(error).splitlines()[0]
            raise OSError(f"{str(out)!r} could not be written: {reason}. Nothing of it was left.") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        for parent in missing:
            with contextlib.suppress(OSError):  # it holds the result
                parent.rmdir()


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes the drafts of runs that were killed. Those of running ones are locked."""
    for folder in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Around reading a file of JSON or YAML and taking fields from it. Only there, missing fields and values
    of wrong types are the file's mistake and not the program's.

    Raises:
        ValueError: the file is damaged; names it, and the field.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file} is damaged: the field {error} is missing.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}).") from error
    except (TypeError, AttributeError, IndexError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged: a field has a value of the wrong type ({reason}).") from error


def read_json(file: str | Path) -> dict[str, Any]:
    """The content of a file that holds a JSON object.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds anything else; names the file.
    """
    with reading(file):
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it must hold a JSON object, not {type(content).__name__}.")
    return content


def not_found(name: str | Path, error: Exception) -> str:
    """The message where a name is no folder, and the Hub's client refused it as a repo with `error`."""
    reason = str(error).splitlines()[0]
    if Path(name).is_file():
        reason = "it is a file"
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):  # a path, not owner/name
        reason = "there is no such folder"
    return f"{str(name)!r} is neither a folder nor a Hub repo that can be read ({reason})."


def check_kinds(folder: Path) -> None:
    """Refuses anything but files and folders in a folder and in the folders in it: reading a pipe would wait
    for ever, and a device may have no end.

    Raises:
        ValueError: names it.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe, a socket or a device: it must be a file. Remove it.")


def file_inside(folder: Path, name: Any, source: Path) -> Path:
    """The file of a folder that another file of it (`source`) names.

    Raises:
        ValueError: it is no name, or leads out of the folder. In the Hub's cache a file may be a link to the
            folder `blobs`, where the content of a repo's files is.
    """
    within = [folder.resolve()]
    within += [parent.parent / "blobs" for parent in within[0].parents if parent.name == "snapshots"]
    plain = isinstance(name, str) and len(name) < 250 and re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name)
    path = Path(os.path.realpath(folder / name)) if plain and ".." not in name.split("/") else None
    if path is None or not any(path.is_relative_to(place) for place in within):
        raise ValueError(
            f"{source} names {str(name)[:250]!r}, which is no file in {folder}. The folder was not made by "
            "this package or Transformers, or its files were moved: copy all of it again."
        )
    return folder / name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model, whether they are there or not: those of its index, or the only one.

    Raises:
        ValueError: the index is damaged, or names files elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    with reading(index):
        names = set(read_json(index)["weight_map"].values())
    return [file_inside(folder, name, index) for name in sorted(names, key=str)]
