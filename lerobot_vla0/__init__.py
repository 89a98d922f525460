"""VLA-0 for LeRobot. Importing this registers `--policy.type=vla0` and `--env.type=vla0_libero`, and loads
neither transformers nor a simulator."""

from importlib import import_module

import gymnasium
from gymnasium.envs.registration import WrapperSpec
from wrapt import register_post_import_hook

from .configuration_vla0 import VLA0Config

__all__ = ["Agent", "VLA0Config"]
__version__ = "0.1.0"

# Processor steps and environment configs must be in LeRobot's registries, whose modules import transformers:
# ours are registered when those are imported, at once if they have been already.
register_post_import_hook(lambda _: import_module(f"{__name__}.processor_vla0"), "lerobot.processor")
register_post_import_hook(lambda _: import_module(f"{__name__}.libero"), "lerobot.envs.configs")
gymnasium.register(
    "lerobot_vla0/Libero-v0",
    entry_point="lerobot_vla0.libero.env:LiberoEnv",  # by name: imported with the first environment
    additional_wrappers=(WrapperSpec("MakeLimit", "lerobot_vla0.libero.env:MakeLimit", kwargs={}),),
)


def __getattr__(name: str) -> object:
    if name == "Agent":  # imports transformers, so only where it is used
        return import_module(f"{__name__}.agent").Agent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
