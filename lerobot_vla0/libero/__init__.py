"""LIBERO: environment configuration, evaluation, stand-in assets. Importing this registers
`--env.type=vla0_libero`; the simulator is imported only when an environment is made."""

from .config import VLA0LiberoEnv

__all__ = ["VLA0LiberoEnv"]
