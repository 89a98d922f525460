"""Prepares hf-libero for use without a terminal: its config file, its assets, the rendering library.

Call `prepare_libero` in every process, before the first import of `libero.libero` or of
`lerobot.envs.libero`.
"""

import importlib.util
import logging
import os
import platform
import sys
from ctypes.util import find_library
from pathlib import Path

import httpx
import yaml
from filelock import FileLock
from huggingface_hub import snapshot_download

from ..files import reading
from .primitives import write_primitive_assets

# Sub-folders that hf-libero itself checks for before it downloads.
ASSET_FOLDERS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects")
ASSETS_REPO = "lerobot/libero-assets"  # where hf-libero downloads from
# Part of the folder's name: raise it whenever primitives.py changes what it writes.
PRIMITIVES_VERSION = 1
# Value of MUJOCO_GL → (library that it needs, Debian packages that bring it), in order of preference.
RENDERERS = {"egl": ("EGL", "libegl1 libegl-mesa0 libgl1"), "osmesa": ("OSMesa", "libosmesa6")}


def prepare_libero(suite: str, assets: str = "auto") -> Path:
    """Writes LIBERO's config file if there is none, and points LIBERO to the assets.

    Args:
        suite: LIBERO suite that will be used, for example "libero_object".
        assets: "real": the official ones, installed or downloaded (`lerobot/libero-assets`); "primitive":
            boxes and cylinders generated here (libero_object only); "auto": the real ones if they are
            installed or can be downloaded, else primitives for libero_object; otherwise a folder with
            LIBERO's asset sub-folders.

    Returns:
        The asset folder. Pass it on to other processes as `assets`, so that they need not search for it.

    Raises:
        ImportError: hf-libero is not installed.
        FileNotFoundError: there are no assets and no way to download them, `assets` is not a folder of
            assets, or LIBERO's config file points to folders that do not exist.
        ValueError: primitives were asked for another suite than libero_object.
        RuntimeError: no library for off-screen rendering.
    """
    # find_spec("libero.libero") would run the sub-package's __init__, which asks for the config on stdin.
    package = importlib.util.find_spec("libero")
    if package is None:
        raise ImportError("LIBERO is not installed: pip install 'lerobot_policy_vla0[libero]'")
    check_rendering()
    root = Path(next(iter(package.submodule_search_locations))) / "libero"
    _ensure_config(root)
    folder = _asset_folder(suite, assets, root)
    import libero.libero as libero

    libero._assets_path_cache = str(folder)
    return folder


def _ensure_config(root: Path) -> None:
    """Writes ~/.libero/config.yaml (or $LIBERO_CONFIG_PATH/config.yaml), without which LIBERO's first import
    asks questions."""
    path = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"
    if path.is_file():
        with reading(path):
            folders = yaml.safe_load(path.read_text()) or {}
            gone = [key for key in ("bddl_files", "init_states") if not Path(folders.get(key, "")).is_dir()]
        if gone:
            listed = ", ".join(f"{key}: {folders.get(key)}" for key in gone)
            raise FileNotFoundError(
                f"{path} points to folders that do not exist ({listed}), probably of an environment that was "
                "removed. Delete the file; it is written anew."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folders = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    # Replaced in one step: several environment processes may do this at once.
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(yaml.safe_dump({key: str(value) for key, value in folders.items()}))
    draft.replace(path)


def _asset_folder(suite: str, assets: str, root: Path) -> Path:
    if assets == "primitive":
        return _primitive_folder(suite)
    if assets not in ("auto", "real"):
        folder = Path(assets).expanduser()
        if not _has_assets(folder):
            raise FileNotFoundError(
                f"assets={assets!r} is neither 'auto', 'real', 'primitive' nor a folder with "
                f"{', '.join(ASSET_FOLDERS)}."
            )
        return folder.resolve()
    # The second is where hf-libero downloads to, and so where LeRobot's own `--env.type=libero` looks.
    downloads = Path.home() / ".cache" / "libero" / "assets"
    for place in (root / "assets", downloads):
        if _has_assets(place):
            return place
    try:
        return _download(downloads)
    except (OSError, httpx.HTTPError) as error:
        if assets == "auto" and suite == "libero_object":
            logging.warning(
                "LIBERO's assets are not installed and could not be downloaded: libero_object runs on "
                "stand-ins made of boxes and cylinders. Scores on them are not LIBERO scores."
            )
            return _primitive_folder(suite)
        raise FileNotFoundError(
            f"{suite} needs LIBERO's assets, and they could not be downloaded ({str(error).splitlines()[0]})."
            f"\nOn a machine with network run `hf download {ASSETS_REPO} --repo-type=dataset "
            "--local-dir=libero_assets`, copy that folder here and pass it as assets=<folder>."
        ) from error


def _download(target: Path) -> Path:
    """Downloads the assets from the Hub, with progress bars.

    hf-libero 0.1.4's own download passes an option that huggingface_hub 1.0 removed: it fails and leaves an
    empty folder. hf-libero would take an incomplete folder for a complete one, so this one is renamed to
    `target` only when it is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name("assets.incomplete")
    with FileLock(target.with_name("assets.lock")):  # several processes may do this at once
        if _has_assets(target):
            return target
        snapshot_download(ASSETS_REPO, repo_type="dataset", local_dir=draft)
        if not _has_assets(draft):
            raise FileNotFoundError(f"{ASSETS_REPO} lacks some of {', '.join(ASSET_FOLDERS)}.")
        if target.is_dir():
            target.rmdir()  # hf-libero's empty folder; fails if anything else is in there
        draft.rename(target)
    return target


def _has_assets(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in ASSET_FOLDERS)


def _primitive_folder(suite: str) -> Path:
    if suite != "libero_object":
        raise ValueError(
            f"assets='primitive' exists for libero_object only, not for {suite}. Use assets='real'."
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return write_primitive_assets(cache / "lerobot_vla0" / f"primitive_assets_v{PRIMITIVES_VERSION}")


def is_primitive(folder: Path) -> bool:
    """Whether the folder that `prepare_libero` returned holds the generated stand-ins."""
    return folder.name.startswith("primitive_assets_v")


def asset_name(folder: Path) -> str:
    """The asset folder's name in result files: "real" for LIBERO's own, wherever they are installed."""
    return "real" if folder.name == "assets" else folder.name


def check_rendering() -> None:
    """On Linux, chooses the library for off-screen rendering: sets MUJOCO_GL, if it is not set, to EGL or
    else OSMesa, whichever is installed.

    Raises:
        RuntimeError: neither is installed, or the one that MUJOCO_GL names is not, or there is none of that
            name.
    """
    if platform.system() != "Linux" or "robosuite" in sys.modules:  # robosuite reads MUJOCO_GL when imported
        return
    backend = os.environ.get("MUJOCO_GL", "").lower().strip()
    if not backend:
        backend = next((name for name, (library, _) in RENDERERS.items() if find_library(library)), "")
        if not backend:
            raise RuntimeError(
                f"No library for off-screen rendering: install {RENDERERS['osmesa'][1]} and set "
                f"MUJOCO_GL=osmesa, or {RENDERERS['egl'][1]} and MUJOCO_GL=egl (Debian and Ubuntu package "
                "names)."
            )
        os.environ["MUJOCO_GL"] = backend
    if backend not in (*RENDERERS, "glfw", "glx", "enable", "enabled", "on", "true", "1"):
        raise RuntimeError(f"MUJOCO_GL={backend} renders nothing. Set it to {' or '.join(RENDERERS)}.")
    library, packages = RENDERERS.get(backend, (None, ""))
    if library and not find_library(library):
        raise RuntimeError(f"MUJOCO_GL={backend}, but its library is missing: install {packages}.")
