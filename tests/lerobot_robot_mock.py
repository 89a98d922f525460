"""A robot plugin of LeRobot without hardware: six joints that are where they were sent, and cameras.

LeRobot imports installed distributions of this name, see `robot_env` in conftest.py. Every action is written
to `log`, a line each: seconds, and the joints.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = dict.fromkeys(("front", "wrist", "top"), (480, 640, 3))


@RobotConfig.register_subclass("mock_arm")
@dataclass
class MockArmConfig(RobotConfig):
    log: str = ""
    joints: int = 6
    keys: list[str] = field(default_factory=lambda: ["front", "wrist"])  # of its cameras


class MockArm(Robot):
    config_class, name = MockArmConfig, "mock_arm"
    is_connected, is_calibrated, cameras = False, True, {}

    def __init__(self, config: MockArmConfig) -> None:
        super().__init__(config)
        self.log = Path(config.log)
        self.log.write_text("")
        self.joints = {f"{joint}.pos": 0.0 for joint in JOINTS[: config.joints]}
        self.keys, self.noise = config.keys, np.random.default_rng(0)

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(self.joints, float)

    @property
    def observation_features(self) -> dict:
        return {**self.action_features, **{key: CAMERAS[key] for key in self.keys}}

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict:
        images = {key: self.noise.integers(0, 256, CAMERAS[key], dtype=np.uint8) for key in self.keys}
        return {**self.joints, **images}

    def send_action(self, action: dict) -> dict:
        self.joints = {joint: float(action[joint]) for joint in self.joints}
        with self.log.open("a") as file:
            file.write(json.dumps([time.perf_counter(), *self.joints.values()]) + "\n")
        return self.joints
