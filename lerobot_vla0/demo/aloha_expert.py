"""A scripted expert of ALOHA's AlohaTransferCube-v0 (gym-aloha): the right arm lifts the cube, the left one
takes it. Positions on a schedule, turned into joint angles by inverse kinematics on the simulator's model."""

from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

# Of the finger tips, in the frame of a gripper (x forward, fingers open along y), in metres.
TIP = np.array([0.14, 0.0, 0.0])
MEETING = np.array([0.0, 0.5, 0.3])
DOWN, UPRIGHT = np.pi / 3, np.pi / 2  # pitch to pick the cube up; roll so that fingers are above and below it
ITERATIONS, DAMPING = 10, 1e-4


@dataclass
class Pose:
    """Of an arm at a step of the schedule."""

    step: int
    tip: np.ndarray  # (3,) of the finger tips, in metres, in the world
    pitch: float  # radians; positive looks down
    roll: float
    opening: float  # of the gripper: 0 closed, 1 open


class TransferExpert:
    """Gives one action after the other; the schedule begins when it is made, after a reset.

    Args:
        env: an unwrapped `gym_aloha` environment with the task transfer_cube.
    """

    def __init__(self, env: Any) -> None:
        self.physics = env._env.physics
        self.model, self.step = self.physics.model.ptr, 0
        self.scratch = mujoco.MjData(self.model)
        self.scratch.qpos[:] = self.physics.data.qpos
        mujoco.mj_kinematics(self.model, self.scratch)
        self.poses = self._schedule(np.array([*self.scratch.qpos[-7:-5], 0.02]))

    def act(self) -> np.ndarray:
        """(14,) joint angles and openings: the left arm's, then the right arm's."""
        self.step += 1
        arms = []
        for i, side in enumerate(("left", "right")):
            pose = self._interpolate(self.poses[side])
            self._solve(side, slice(8 * i, 8 * i + 6), pose)
            arms.append([*self.scratch.qpos[8 * i : 8 * i + 6], pose.opening])
        return np.concatenate(arms)

    def _schedule(self, cube: np.ndarray) -> dict[str, list[Pose]]:
        left, right = (self._tip(side)[0] for side in ("left", "right"))
        above, aside = np.array([0, 0, 0.1]), np.array([-0.012, 0, 0])
        return {
            "right": [
                Pose(0, right, -0.1, 0, 0.1),
                Pose(30, cube + above, DOWN, 0, 1),
                Pose(50, cube, DOWN, 0, 1),
                Pose(62, cube, DOWN, 0, 0),
                Pose(100, MEETING, DOWN, 0, 0),
            ],
            "left": [
                Pose(0, left, -0.1, 0, 0.1),
                Pose(40, left, -0.1, 0, 0.1),
                Pose(100, MEETING + 10 * aside, 0, UPRIGHT, 1),
                Pose(125, MEETING + aside, 0, UPRIGHT, 1),
                Pose(140, MEETING + aside, 0, UPRIGHT, 0),
            ],
        }

    def _interpolate(self, poses: list[Pose]) -> Pose:
        steps = [pose.step for pose in poses]
        i = min(max(1, int(np.searchsorted(steps, self.step))), len(poses) - 1)
        a, b = poses[i - 1], poses[i]
        x = np.clip((self.step - a.step) / (b.step - a.step), 0, 1)
        x = x * x * (3 - 2 * x)  # starts and stops gently
        names = ("tip", "pitch", "roll", "opening")
        return Pose(self.step, *((1 - x) * getattr(a, n) + x * getattr(b, n) for n in names))

    def _tip(self, side: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Place and rotation of the finger tips in the scratch data, and the gripper's body."""
        body = self.model.body(f"vx300s_{side}/gripper_link").id
        rotation = self.scratch.xmat[body].reshape(3, 3)
        return self.scratch.xpos[body] + rotation @ TIP, rotation, body

    def _solve(self, side: str, joints: slice, pose: Pose) -> None:
        """Damped least squares, from the last solution."""
        wanted = _rotation(0.0 if side == "left" else np.pi, pose.pitch, pose.roll)
        at, turn = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
        # `joints` are numbers of qpos and of qvel: up to the cube, which comes last, these are the same.
        limits = self.model.jnt_range[joints]
        for _ in range(ITERATIONS):
            mujoco.mj_kinematics(self.model, self.scratch)
            mujoco.mj_comPos(self.model, self.scratch)
            tip, rotation, body = self._tip(side)
            off = 0.5 * sum(np.cross(rotation[:, k], wanted[:, k]) for k in range(3))
            error = np.concatenate([pose.tip - tip, 0.3 * off])
            mujoco.mj_jac(self.model, self.scratch, at, turn, tip, body)
            jacobian = np.concatenate([at[:, joints], 0.3 * turn[:, joints]])
            change = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING * np.eye(6), error)
            angles = self.scratch.qpos[joints] + np.clip(change, -0.2, 0.2)
            self.scratch.qpos[joints] = np.clip(angles, limits[:, 0], limits[:, 1])


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return about_z @ about_y @ about_x
