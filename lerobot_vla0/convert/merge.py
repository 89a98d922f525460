"""`lerobot-vla0 merge`: an adapter folded into its base, as a full checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import ADAPTER_CONFIG
from ..files import new_folder
from ..options import PolicyOptions


@dataclass(kw_only=True)
class MergeConfig(PolicyOptions):
    """What to merge. `--policy.path=` names the adapter checkpoint; its fields can be overridden
    (`--policy.dtype=float32`)."""

    # Folder to write.
    out: Path


def merge(config: MergeConfig) -> Path:
    """Writes the checkpoint, processors included, to `config.out` and returns it. The result no longer needs
    the base.

    Raises:
        FileExistsError: `out` exists and is not empty.
        ValueError: no policy, one of another type or that is no adapter, or one that does not fit its base.
        FileNotFoundError: the adapter's base is not there.
        ImportError: peft is not installed.
    """
    # Imported here: transformers takes seconds, and `--help` must not.
    from ..modeling_vla0 import VLA0Policy
    from ..processor_vla0 import load_processors

    settings = config.require_policy("which adapter?")
    out, path = Path(config.out), str(settings.pretrained_path)
    with new_folder(out) as folder:
        if not settings.use_peft:
            raise ValueError(f"{path} is no adapter (it has no {ADAPTER_CONFIG}): there is nothing to merge.")
        policy = VLA0Policy.from_pretrained(path, config=settings, revision=settings.pretrained_revision)
        policy.save_pretrained(folder)
        for processor in load_processors(policy.config, path, settings.pretrained_revision):
            processor.save_pretrained(folder)
    print(f"Wrote {out}")
    return out
