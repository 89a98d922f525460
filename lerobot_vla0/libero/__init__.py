"""LIBERO: environment and evaluation. Importing this registers `--env.type=vla0_libero`; the simulator is
imported only when an environment is made."""

from .env import VLA0LiberoEnv

__all__ = ["VLA0LiberoEnv"]
