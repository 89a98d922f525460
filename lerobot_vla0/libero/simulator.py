"""LIBERO's simulator (robosuite) without rendering pictures that are not returned, drawing shapes that are
outside a picture, or building the model again at every reset. The numbers that it computes are the same.

In robosuite, two cameras take 85-95 % of a step, mostly for triangles, half of which are outside the picture;
a reset builds model and GL context again and renders 28 pictures, of which two are returned.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# Fields of MuJoCo's model that resets and steps change: poses of fixtures, and marks such as the glow of a
# stove that is on.
CHANGING_FIELDS = ("body_pos", "body_quat", "site_rgba")


def make_simulator(bddl_file: str | Path, image_size: int, control_freq: int) -> tuple[Any, "Cameras"]:
    """LIBERO's `OffScreenRenderEnv` of a task, not reset yet, and its cameras. Its observations have empty
    arrays in place of pictures."""
    from libero.libero.envs import OffScreenRenderEnv

    simulator = OffScreenRenderEnv(
        bddl_file_name=str(bddl_file),
        camera_heights=image_size,
        camera_widths=image_size,
        control_freq=control_freq,
        hard_reset=False,
        ignore_done=True,  # the step limit is the environment's; at robosuite's own, 1,000, it would raise
    )
    _reset_as_if_built_anew(simulator.env)
    return simulator, Cameras(simulator.env)


def _reset_as_if_built_anew(env: Any) -> None:
    """Makes robosuite's reset without a new model (`hard_reset=False`) leave the same numbers as one with a
    new model, LIBERO's default.

    Otherwise the steps after a reset give slightly other states, because the constraint solver starts from
    its last solution, the gripper's command is that of the last episode, and changes of the model remain.
    """
    import mujoco

    sim = env.sim
    model = sim.model._model
    built = {name: getattr(model, name).copy() for name in CHANGING_FIELDS}

    def reset() -> None:
        for name, value in built.items():
            getattr(model, name)[:] = value
        for robot in env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        mujoco.mj_resetData(model, sim.data._data)
        # A build computes the forward dynamics twice, after loading and when it makes the GL context; the
        # solver's starting point depends on it.
        sim.forward()
        sim.forward()

    sim.reset = reset


class Cameras:
    """Draws pictures of the last control step, when asked to.

    robosuite samples a camera in the middle of a control step, by a clock that depends on all steps before.
    At this moment only the scene is recorded (positions, colours, lights: 0.1 ms), so that the picture that
    is drawn later is bit for bit robosuite's.

    Args:
        env: robosuite's environment.
    """

    def __init__(self, env: Any) -> None:
        import mujoco
        from robosuite.utils.observables import sensor

        self.sim = env.sim
        names, sizes = env.camera_names, (env.camera_widths, env.camera_heights)
        self._sizes = dict(zip(names, zip(*sizes, strict=True), strict=True))
        self._scenes = {name: mujoco.MjvScene(self.sim.model._model, maxgeom=1000) for name in self._sizes}
        model = self.sim.model._model
        # MuJoCo draws reflections on planes and boxes only.
        flat = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
        materials = np.append(model.mat_reflectance, 0)  # the last is for geom_matid = -1, no material
        self._mirrors = flat & (materials[model.geom_matid] > 0)
        self._shadows = bool(model.light_castshadow.any())
        for name in self._sizes:
            env.modify_observable(
                f"{name}_image", "sensor", sensor("image")(partial(self._record_scene, name))
            )

    def _record_scene(self, name: str, _: dict[str, Any]) -> np.ndarray:
        import mujoco

        context = self.sim._render_context_offscreen
        model, data = self.sim.model._model, self.sim.data._data
        camera = self.sim.model.camera_name2id(name)
        context.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
        context.cam.fixedcamid = camera
        groups = model.geom_group.copy()
        hidden = np.flatnonzero(context.vopt.geomgroup == 0)[0]  # robosuite shows visual shapes only
        model.geom_group[self._outside(camera, name)] = hidden
        view = (context.vopt, context.pert, context.cam, mujoco.mjtCatBit.mjCAT_ALL)
        mujoco.mjv_updateScene(model, data, *view, self._scenes[name])
        model.geom_group[:] = groups
        return np.zeros(0)

    def _outside(self, camera: int, name: str) -> np.ndarray:
        """bool (geoms,): bounding spheres that are outside the picture. All false where a mirror in the
        picture or a shadow could show them."""
        model, data = self.sim.model._model, self.sim.data._data
        # Camera coordinates: x to the right, y up, the view along -z.
        x, y, z = ((data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)).T
        radius = 1.01 * model.geom_rbound + 0.001  # a margin for rounding
        width, height = self._sizes[name]
        up = np.tan(np.radians(model.cam_fovy[camera]) / 2)  # half of the picture's height at distance 1
        right = up * width / height
        outside = (z > radius) | (np.abs(y) + up * z > radius * np.hypot(1, up))
        outside |= np.abs(x) + right * z > radius * np.hypot(1, right)
        outside &= model.geom_rbound > 0  # 0: a plane, which has no bounds
        if self._shadows or (self._mirrors & ~outside).any():
            outside[:] = False
        return outside

    def draw(self, name: str) -> np.ndarray:
        """uint8 (height, width, 3), rows from the bottom to the top, as robosuite returns them."""
        import mujoco

        context, (width, height) = self.sim._render_context_offscreen, self._sizes[name]
        context.gl_ctx.make_current()  # another environment of this process may have rendered meanwhile
        if width > context.con.offWidth or height > context.con.offHeight:
            context.update_offscreen_size(
                max(width, context.con.offWidth), max(height, context.con.offHeight)
            )
        viewport, picture = mujoco.MjrRect(0, 0, width, height), np.empty((height, width, 3), np.uint8)
        mujoco.mjr_render(viewport, self._scenes[name], context.con)
        mujoco.mjr_readPixels(picture, None, viewport, context.con)
        return picture
