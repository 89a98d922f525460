"""LIBERO: environment configuration, stand-in assets, scripted expert, recorder. Importing this registers
`--env.type=vla0_libero`; the simulator is imported only when an environment is made."""

from .config import VLA0LiberoEnv

__all__ = ["VLA0LiberoEnv"]
