"""VLA-0 for LeRobot. Importing this registers `--policy.type=vla0` and `--env.type=vla0_libero`.

Stays light: neither transformers nor a simulator is imported that LeRobot has not imported already.
"""

import sys
from importlib import import_module

import gymnasium

from .configuration_vla0 import VLA0Config

# LeRobot finds policy and processor by module name when it needs them. What it looks up in registries must be
# registered here, but the registries' own modules import transformers: join in only where they are loaded
# (they are in each of LeRobot's scripts; in Python, `import lerobot_vla0.libero` after the fact does the
# same).
if "lerobot.processor" in sys.modules:
    import_module(f"{__name__}.processor_vla0")
if "lerobot.envs.configs" in sys.modules:
    import_module(f"{__name__}.libero")

# An entry point by name: the simulator is imported when the first environment is made.
gymnasium.register("lerobot_vla0/Libero-v0", entry_point="lerobot_vla0.libero.env:LiberoEnv")


def __getattr__(name: str) -> object:
    if name == "Agent":  # imports transformers, so only where it is used
        return import_module(f"{__name__}.agent").Agent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Agent", "VLA0Config"]
__version__ = "0.1.0"
