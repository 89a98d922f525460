"""Makes hf-libero usable without a terminal: its config file, its assets, the rendering library.

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

import yaml

from .primitives import write_primitive_assets

# Sub-folders that hf-libero itself checks for before it downloads.
ASSET_FOLDERS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects")
# Part of the folder's name: raise it whenever primitives.py changes what it writes.
PRIMITIVES_VERSION = 1


def prepare_libero(suite: str, assets: str = "auto") -> Path | None:
    """Answers LIBERO's question for its config file and points it at the assets.

    Args:
        suite: LIBERO suite that will be used, for example "libero_object".
        assets: "real": the official ones, installed or downloaded by hf-libero; "primitive": boxes and
            cylinders generated here (libero_object only); "auto": the real ones if they are installed, else
            primitives for libero_object; otherwise a folder with LIBERO's asset sub-folders.

    Returns:
        The asset folder, or None where hf-libero finds or downloads the real ones itself.

    Raises:
        ImportError: hf-libero is not installed.
        FileNotFoundError: `assets` is no folder of assets, or LIBERO's config points to folders that are
            gone.
        ValueError: primitives were asked for another suite than libero_object.
        RuntimeError: no library for off-screen rendering.
    """
    # find_spec of the sub-package would run its __init__, which asks the question.
    package = importlib.util.find_spec("libero")
    if package is None:
        raise ImportError("LIBERO is not installed: pip install 'lerobot_policy_vla0[libero]'")
    check_rendering()
    root = Path(next(iter(package.submodule_search_locations))) / "libero"
    _ensure_config(root)
    folder = _asset_folder(suite, assets, root)
    import libero.libero as libero

    if folder is not None:
        libero._assets_path_cache = str(folder)
    return folder


def _ensure_config(root: Path) -> None:
    """Writes ~/.libero/config.yaml (or $LIBERO_CONFIG_PATH/config.yaml), about which LIBERO asks on first
    import."""
    path = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"
    if path.is_file():
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
    # Replaced in one step: several environment processes may get here at once.
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(yaml.safe_dump({key: str(value) for key, value in folders.items()}))
    draft.replace(path)


def _asset_folder(suite: str, assets: str, root: Path) -> Path | None:
    if assets == "real":
        return None
    if assets == "auto":
        places = (root / "assets", Path.home() / ".cache" / "libero" / "assets")
        if suite != "libero_object" or any(_has_assets(place) for place in places):
            return None
        logging.warning(
            "LIBERO's assets are not installed: libero_object runs on stand-ins made of boxes and cylinders. "
            "Scores on them are not LIBERO scores. Choose with assets=real or assets=primitive."
        )
        return _primitives(suite)
    if assets == "primitive":
        return _primitives(suite)
    folder = Path(assets).expanduser()
    if not _has_assets(folder):
        raise FileNotFoundError(
            f"assets={assets!r} is neither 'auto', 'real', 'primitive' nor a folder with "
            f"{', '.join(ASSET_FOLDERS)}."
        )
    return folder.resolve()


def _has_assets(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in ASSET_FOLDERS)


def _primitives(suite: str) -> Path:
    if suite != "libero_object":
        raise ValueError(
            f"assets='primitive' exists for libero_object only, not for {suite}. Use assets='real'."
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return write_primitive_assets(cache / "lerobot_vla0" / f"primitive_assets_v{PRIMITIVES_VERSION}")


def is_primitive(folder: Path | None) -> bool:
    """Whether what `prepare_libero` returned are the generated stand-ins."""
    return folder is not None and folder.name.startswith("primitive_assets_v")


def check_rendering() -> None:
    """On Linux: sets MUJOCO_GL where it is not set, to EGL or else OSMesa, whichever library is there.

    Raises:
        RuntimeError: neither is there, or the one that MUJOCO_GL names is not.
    """
    if platform.system() != "Linux" or "robosuite" in sys.modules:  # it reads the variable when imported
        return
    libraries = {"egl": "EGL", "osmesa": "OSMesa"}
    packages = {"egl": "libegl1 libegl-mesa0 libgl1", "osmesa": "libosmesa6"}
    backend = os.environ.get("MUJOCO_GL", "").lower()
    if not backend:
        backend = next((b for b, library in libraries.items() if find_library(library)), "")
        if not backend:
            raise RuntimeError(
                f"No library for off-screen rendering: install {packages['osmesa']} and set "
                f"MUJOCO_GL=osmesa, or {packages['egl']} and MUJOCO_GL=egl (Debian and Ubuntu package "
                "names)."
            )
        os.environ["MUJOCO_GL"] = backend
    if backend in libraries and not find_library(libraries[backend]):
        raise RuntimeError(f"MUJOCO_GL={backend}, but its library is missing: install {packages[backend]}.")
