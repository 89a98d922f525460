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
from huggingface_hub import snapshot_download

# Sub-folders by which hf-libero recognises assets.
ASSET_FOLDERS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects")
ASSETS_REPO = "lerobot/libero-assets"  # where hf-libero downloads from
# Boxes and cylinders with the names, sites, contact parameters and about the sizes of libero_object's meshes.
# Change the version in the name with the content: results name the folder.
STAND_INS = Path(__file__).with_name("primitive_assets_v1")
# Value of MUJOCO_GL → (library that it needs, Debian packages that bring it), in order of preference.
RENDERERS = {"egl": ("EGL", "libegl1 libegl-mesa0 libgl1"), "osmesa": ("OSMesa", "libosmesa6")}


def prepare_libero(suite: str, assets: str = "auto") -> Path:
    """Writes LIBERO's config file if there is none, and points LIBERO to the assets.

    Args:
        assets: "real": LIBERO's own, installed or downloaded; "primitive": stand-ins of boxes and cylinders
            (libero_object only); "auto": the real ones if they are installed or can be downloaded, else the
            stand-ins for libero_object; otherwise a folder with LIBERO's asset sub-folders.

    Returns:
        The asset folder, which is the quickest `assets` for other processes.
    """
    # find_spec("libero.libero") would run the sub-package's __init__, which asks for the config on stdin.
    package = importlib.util.find_spec("libero")
    if package is None:
        raise ImportError("LIBERO is not installed: pip install 'lerobot_policy_vla0[libero]'")
    check_rendering()
    root = Path(next(iter(package.submodule_search_locations))) / "libero"
    _ensure_config(root)
    import libero.libero as libero

    folder = _asset_folder(suite, assets, root)
    libero._assets_path_cache = str(folder)
    return folder


def _ensure_config(root: Path) -> None:
    """Writes ~/.libero/config.yaml (or $LIBERO_CONFIG_PATH/config.yaml), without which LIBERO's first import
    asks questions."""
    path = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folders = {"benchmark_root": "", "bddl_files": "bddl_files", "init_states": "init_files"}
    folders |= {"datasets": "../datasets", "assets": "assets"}
    # Replaced in one step: several environment processes may do this at once.
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(yaml.safe_dump({key: str(root / name) for key, name in folders.items()}))
    draft.replace(path)


def _asset_folder(suite: str, assets: str, root: Path) -> Path:
    if assets == "primitive":
        if suite != "libero_object":
            raise ValueError(f"assets='primitive' exists for libero_object only, not for {suite}.")
        return STAND_INS
    if assets not in ("auto", "real"):
        if not _has_assets(folder := Path(assets).expanduser().resolve()):
            needed = ", ".join(ASSET_FOLDERS)
            raise FileNotFoundError(
                f"assets={assets!r} is not auto, real, primitive or a folder with {needed}."
            )
        return folder
    # hf-libero would download to the second; version 0.1.4 passes an option that the Hub's client removed.
    for folder in (root / "assets", Path.home() / ".cache" / "libero" / "assets"):
        if _has_assets(folder):
            return folder
    try:
        return Path(snapshot_download(ASSETS_REPO, repo_type="dataset"))
    except (OSError, httpx.HTTPError) as error:
        if assets == "auto" and suite == "libero_object":
            logging.warning(
                "LIBERO's assets could not be downloaded: libero_object runs on stand-ins made of boxes and "
                "cylinders. Scores on them are not LIBERO scores."
            )
            return STAND_INS
        raise FileNotFoundError(
            f"{suite} needs LIBERO's assets, and they could not be downloaded ({str(error).splitlines()[0]})."
            f"\nOn a machine with network run `hf download {ASSETS_REPO} --repo-type=dataset "
            "--local-dir=libero_assets`, copy that folder here and pass it as assets=<folder>."
        ) from error


def _has_assets(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in ASSET_FOLDERS)


def is_primitive(folder: Path) -> bool:
    """Whether the folder that `prepare_libero` returned holds the stand-ins."""
    return folder.name.startswith("primitive_assets_v")


def asset_name(folder: Path) -> str:
    """The asset folder's name in result files: "real" for LIBERO's own, wherever they are installed."""
    return "real" if folder.name == "assets" or folder.parent.name == "snapshots" else folder.name


def check_rendering() -> None:
    """On Linux, sets MUJOCO_GL, if it is not set, to an installed library for off-screen rendering."""
    if platform.system() != "Linux" or "robosuite" in sys.modules:  # robosuite reads MUJOCO_GL when imported
        return
    installed = [name for name, (library, _) in RENDERERS.items() if find_library(library)]
    backend = os.environ.get("MUJOCO_GL", "").lower().strip() or next(iter(installed), "osmesa")
    if backend in RENDERERS and backend not in installed:
        raise RuntimeError(
            f"MUJOCO_GL={backend}, but its library is missing: install {RENDERERS[backend][1]} (Debian and "
            f"Ubuntu package names), or set MUJOCO_GL to another of {', '.join(RENDERERS)}."
        )
    os.environ["MUJOCO_GL"] = backend
