"""A scripted pick-and-place controller for LIBERO's "pick up X and place it in the basket" tasks
(libero_object).

It reads the simulator's state, not the images. Its actions are the robot's: OSC_POSE deltas in [-1, 1] at
20 Hz (three of position, three of rotation), then the gripper, -1 open, +1 closed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

SUITE = "libero_object"
OPEN, CLOSE = -1.0, 1.0
# Action per metre and per radian of error, before clipping to [-1, 1].
POSITION_GAIN, ROTATION_GAIN = 12.0, 3.0
PALM = 0.028  # metres from the fingertips' site up to the palm, less a margin (contact was measured at 0.033)
MAX_OPENING = 0.062  # metres between the open fingers that can be used safely
CLOSE_STEPS, OPEN_STEPS = 9, 8  # control steps until the fingers have closed or opened


class PickAndPlaceExpert:
    """Picks up the task's object and drops it in the basket; starts again if the object was lost.

    Args:
        env: LIBERO's `OffScreenRenderEnv` (or its `ControlEnv`), reset and settled.

    Raises:
        ValueError: the task's goal is not "object in basket".
    """

    def __init__(self, env: Any) -> None:
        goals = env.env.parsed_problem["goal_state"]
        if len(goals) != 1 or goals[0][0] != "in" or not goals[0][2].endswith("_contain_region"):
            raise ValueError(
                f"the expert solves 'pick up X and place it in the basket' (libero_object), not {goals}."
            )
        self.env = env
        self.target, self.basket = goals[0][1], goals[0][2].removesuffix("_contain_region")
        self._plan()
        self._actions = self._attempts()

    def act(self) -> np.ndarray:
        """The next action, float32 (7,), in [-1, 1]. Call once per control step."""
        return next(self._actions)

    # ---------------------------------------------------------------------------------- the simulator's state

    @property
    def _hand(self) -> np.ndarray:
        """Position of the point between the fingertips, world frame, metres."""
        return np.array(self.env.sim.data.site_xpos[self.env.robots[0].eef_site_id])

    @property
    def _hand_rotation(self) -> np.ndarray:
        return np.array(self.env.sim.data.site_xmat[self.env.robots[0].eef_site_id]).reshape(3, 3)

    @property
    def _object(self) -> np.ndarray:
        """Position of the object to be picked up, world frame, metres."""
        return np.array(self.env.sim.data.body_xpos[self.env.env.obj_body_id[self.target]])

    def _geoms(self, name: str) -> list[np.ndarray]:
        """Corner points (n, 3), world frame, of the bounding shape of each of an object's collision geoms."""
        import mujoco  # not above: its first import needs MUJOCO_GL, which `prepare_libero` sets

        model, data = self.env.sim.model._model, self.env.sim.data._data
        root, result = self.env.env.obj_body_id[name], []
        for g in range(model.ngeom):
            body = model.geom_bodyid[g]
            while body not in (0, root):
                body = model.body_parentid[body]
            if body != root or not (model.geom_contype[g] or model.geom_conaffinity[g]):
                continue
            kind, size, centre = model.geom_type[g], model.geom_size[g], np.zeros(3)
            if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
                angle = np.arange(16) * np.pi / 8
                ring = np.stack([np.cos(angle) * size[0], np.sin(angle) * size[0]], axis=1)
                points = np.concatenate([np.c_[ring, np.full(16, z)] for z in (-size[1], size[1])])
            else:
                half = size
                if kind != mujoco.mjtGeom.mjGEOM_BOX:
                    centre, half = model.geom_aabb[g][:3], model.geom_aabb[g][3:]
                signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
                points = signs * half
            result.append((points + centre) @ data.geom_xmat[g].reshape(3, 3).T + data.geom_xpos[g])
        return result

    def _corners(self, name: str) -> np.ndarray:
        return np.concatenate(self._geoms(name))

    # ----------------------------------------------------------------------------------------------- planning

    def _plan(self) -> None:
        """Where to grasp: as deep as the palm allows, across the narrowest side, hand straight down."""
        points = self._corners(self.target)
        low, high = points.min(0), points.max(0)
        self.grasp_z = max((low[2] + high[2]) / 2, high[2] - PALM, low[2] + 0.008)
        # Only the geoms at the height of the fingers matter for the width.
        near = [g for g in self._geoms(self.target) if g[:, 2].min() < self.grasp_z + 0.012]
        near = [g for g in near if g[:, 2].max() > self.grasp_z - 0.012]
        band = np.concatenate(near)[:, :2] if near else points[:, :2]
        body = self.env.sim.model.body_name2id
        fingers = self.env.sim.data.body_xpos[body("gripper0_leftfinger")]
        fingers = fingers - self.env.sim.data.body_xpos[body("gripper0_rightfinger")]
        closing = np.arctan2(fingers[1], fingers[0])  # world angle of the line through both fingers

        def cost(turn: float) -> float:
            axis = np.array([np.cos(closing + turn), np.sin(closing + turn)])
            width = np.ptp(band @ axis)
            return 100 * max(0.0, width - MAX_OPENING) + 20 * width + 0.12 * abs(turn)

        turn = min(np.deg2rad(np.arange(-90, 91, 5)), key=cost)
        angle = closing + turn
        axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        extent = band @ axes.T
        grasp_xy = (extent.min(0) + extent.max(0)) / 2 @ axes
        # The object may still roll: the hand follows it at this offset until the fingers close.
        self.offset = grasp_xy - self._object[:2]
        cos, sin = np.cos(turn), np.sin(turn)
        x = (np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ self._hand_rotation)[:, 0]
        x[2] = 0
        x /= np.linalg.norm(x)
        down = np.array([0.0, 0.0, -1.0])
        self.rotation = np.stack([x, np.cross(down, x), down], axis=1)
        basket = self._corners(self.basket)
        self.basket_xy = (basket.min(0) + basket.max(0))[:2] / 2
        self.basket_top = basket[:, 2].max()
        others = [n for n in self.env.env.objects_dict if n not in (self.target, self.basket)]
        tallest = max([self._corners(n)[:, 2].max() for n in others], default=0.0)
        self.above_z = max(high[2], tallest) + 0.05

    # ------------------------------------------------------------------------------------------------ control

    def _toward(self, goal: np.ndarray, gripper: float) -> np.ndarray:
        """Proportional control of the hand's pose, clipped to the action range."""
        error = self.rotation @ self._hand_rotation.T
        # Axis-angle of the rotation error in the world frame, as the controller expects it.
        angle = np.arccos(np.clip((np.trace(error) - 1) / 2, -1, 1))
        axis = np.array([error[2, 1] - error[1, 2], error[0, 2] - error[2, 0], error[1, 0] - error[0, 1]])
        self.angle_left = angle
        rotation = axis / max(2 * np.sin(angle), 1e-6) * angle
        move = np.clip((goal - self._hand) * POSITION_GAIN, -1, 1)
        return np.r_[move, np.clip(rotation * ROTATION_GAIN, -1, 1), gripper].astype(np.float32)

    def _over_basket(self) -> np.ndarray:
        """x and y of the hand at which the object is over the middle of the basket."""
        return self.basket_xy - (self._object - self._hand)[:2]

    def _attempts(self) -> Iterator[np.ndarray]:
        """Actions of one attempt after the other.

        Whether a movement is finished, and the plan of the next attempt, are decided before the last action
        of the movement is executed. Every movement has a limit of steps.
        """
        while True:
            for _ in range(61):  # above the object
                xy, hand = self._object[:2] + self.offset, self._hand
                action = self._toward(np.r_[xy, self.above_z], OPEN)
                there = np.linalg.norm(hand[:2] - xy) < 0.008 and abs(hand[2] - self.above_z) < 0.03
                there = there and self.angle_left < 0.08
                yield action
                if there:
                    break
            for _ in range(41):  # down to it
                goal = np.r_[self._object[:2] + self.offset, self.grasp_z]
                there = np.linalg.norm(goal - self._hand) < 0.006
                yield self._toward(goal, OPEN)
                if there:
                    break
            grasp_xy = goal[:2]
            for _ in range(CLOSE_STEPS):
                held = self._object - self._hand
                below_hand = self._hand[2] - self._corners(self.target)[:, 2].min()
                yield self._toward(np.r_[grasp_xy, self.grasp_z], CLOSE)
            carry_z = self.basket_top + below_hand + 0.03
            for step in range(41):  # up, after which the object must still be where it was in the hand
                action = self._toward(np.r_[grasp_xy, carry_z], CLOSE)
                there = self._hand[2] > carry_z - 0.02 or step == 40
                lifted = self._object - self._hand
                lost = there and np.linalg.norm(lifted - held) > 0.05
                if lost:
                    self._plan()
                yield action
                if there:
                    break
            if lost:
                continue
            for _ in range(81):  # over the basket
                goal = np.r_[self._over_basket(), carry_z]
                action = self._toward(goal, CLOSE)
                there = np.linalg.norm(self._hand[:2] - goal[:2]) < 0.012
                lost = np.linalg.norm(self._object - self._hand - lifted) > 0.06
                if lost:
                    self._plan()
                yield action
                if there or lost:
                    break
            if lost:
                continue
            for _ in range(31):  # down: the object's middle below the rim, the fingertips above it
                hand_z, object_z = self._hand[2], self._object[2]
                z = max(self.basket_top + 0.015, self.basket_top - 0.025 + hand_z - object_z)
                yield self._toward(np.r_[self._over_basket(), z], CLOSE)
                if abs(hand_z - z) < 0.008:
                    break
            for _ in range(OPEN_STEPS):
                yield self._toward(self._hand, OPEN)
            for _ in range(20):  # up
                yield self._toward(self._hand + np.array([0, 0, 0.1]), OPEN)
            action = self._toward(self._hand + np.array([0, 0, 0.1]), OPEN)
            self._plan()  # the episode has not ended: the object is not in the basket
            yield action
