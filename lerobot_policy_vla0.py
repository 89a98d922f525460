"""The name under which LeRobot discovers this plugin (see `[project] name` in pyproject.toml)."""

import lerobot_vla0  # noqa: F401
