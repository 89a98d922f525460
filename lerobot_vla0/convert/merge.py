"""`lerobot-vla0 merge`: an adapter folded into its base, as a full checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import ADAPTER_CONFIG
from ..cli import PolicyOptions
from ..files import new_folder


@dataclass(kw_only=True)
class MergeConfig(PolicyOptions):
    """`--policy.path=` names the adapter; `--policy.dtype=float32` overrides a field."""

    # Folder to write.
    out: Path


def merge(config: MergeConfig) -> Path:
    """Writes the checkpoint, processors included, to `config.out` and returns it. It does not need the base.

    Raises:
        FileExistsError: `out` exists and is not empty.
        FileNotFoundError: the adapter's base is missing.
        ValueError: the checkpoint is no adapter, or does not fit its base.
    """
    # Imported here: transformers takes seconds, and `--help` must not.
    from ..modeling_vla0 import VLA0Policy
    from ..processor_vla0 import load_processors

    settings = config.require_policy("which adapter?")
    path, revision = str(settings.pretrained_path), settings.pretrained_revision
    if not settings.use_peft:
        raise ValueError(f"{path} is no adapter (it has no {ADAPTER_CONFIG}): there is nothing to merge.")
    with new_folder(config.out) as folder:
        policy = VLA0Policy.from_pretrained(path, config=settings, revision=revision)
        for part in (policy, *load_processors(policy.config, path, revision)):
            part.save_pretrained(folder)
    print(f"Wrote {config.out}")
    return config.out
