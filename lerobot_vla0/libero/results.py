"""The results folder of an evaluation: what it was made with, and its episodes as they end."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import PreTrainedConfig

from ..adapters import find_source
from ..configuration_vla0 import VLA0Config
from ..files import check_place, read_json
from .report import Episode, read_episodes

SETTINGS = "settings.json"
PACKAGES = ("lerobot", "lerobot_policy_vla0", "transformers", "torch", "hf-libero", "robosuite", "mujoco")
# Fields of the policy's config that do not change its actions.
IGNORED_FIELDS = {
    "device", "pretrained_path", "compile_model", "draft_length", "stream", "push_to_hub", "repo_id",
    "private", "tags",
}  # fmt: skip


def describe_policy(config: VLA0Config) -> dict[str, Any]:
    """The part of the settings that belongs to the policy."""
    fields = draccus.encode(config, PreTrainedConfig)
    return {
        "policy_path": str(config.pretrained_path),
        "weights": weights_hash(config),
        "policy": {key: value for key, value in fields.items() if key not in IGNORED_FIELDS},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def weights_hash(config: VLA0Config) -> str:
    """SHA-256 of what a checkpoint acts with: weights, an adapter's base, processors and their statistics."""
    source = find_source(str(config.pretrained_path), config)
    folders = [source.base.folder, *([Path(source.adapter)] if source.adapter else [])]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted({*folder.glob("*.safetensors"), *folder.glob("policy_*.json")}):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_folder(folder: Path, settings: dict[str, Any]) -> bool:
    """Refuses a results folder before any work; says whether it holds episodes. Writes nothing. Settings
    without an episode, of a run that failed at its start, do not count.

    Raises:
        ValueError: it holds episodes of other settings.
        OSError: nothing can be written there.
    """
    check_place(folder, "folder")
    if not read_episodes(folder):
        return False
    if not (folder / SETTINGS).is_file():
        raise ValueError(
            f"out={str(folder)!r} holds episodes, but {SETTINGS} is missing. Choose another --out."
        )
    before, now = (
        {**s, **{f"policy.{name}": value for name, value in s["policy"].items()}}
        for s in (read_json(folder / SETTINGS), json.loads(json.dumps(settings)))
    )
    for name in now:
        if name not in ("policy", "versions") and before.get(name) != now[name]:
            raise ValueError(
                f"{folder} holds results of other settings: {name} was {before.get(name)!r}, is "
                f"{now[name]!r}. Choose another --out, or repeat the settings in {folder / SETTINGS}."
            )
    return True


def save_episode(folder: Path, shard: str, settings: dict[str, Any], row: Episode) -> None:
    """Appends an episode to its shard's file and flushes it to disk. The folder is made, and its settings are
    written, with the first one.

    Raises:
        ValueError: another shard has begun meanwhile with other settings.
    """
    has_episodes = check_folder(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if not has_episodes:
        draft = folder / f"{SETTINGS}.{os.getpid()}"  # replaced in one step: shards may start at once
        draft.write_text(json.dumps(settings, indent=2))
        draft.replace(folder / SETTINGS)
    path = folder / f"episodes-{shard.replace('/', 'of')}.jsonl"
    with path.open("ab") as file:
        # A line that a kill cut off is taken away; nothing else of the file is touched.
        torn = len(path.read_bytes().rpartition(b"\n")[2])
        file.truncate(file.tell() - torn)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
