"""A planner that solves PushT (gym-pusht) with the simulator's state.

It tries pushes on a copy of the scene, from where the agent is and from places around the T, and takes the
one that brings the T nearer to its goal fastest, the walk there included. It plans anew at every step and
remembers nothing, so that what it does depends on what the camera and the state show.
"""

from typing import Any

import numpy as np

# Pixels of PushT's 512 × 512 plane, and control steps (0.1 s).
RADIUS = 15.0  # of the agent
CELL = 8  # of the grid on which walks are searched
CLEARANCE = 4.0  # between the agent and the T, on walks
STRIDE = 24.0  # how far ahead of the agent its target is on a walk
# The same for pushes, of which the agent does half in a step, and the T's errors at which they are tried.
LEADS = ((16.0, 20.0, np.inf), (5.0, 0.0, 40.0))
PUSH_STEPS = 12  # longest push that is tried
TRIED = 12  # places around the T whose pushes are tried
GOOD_RATE = 3.0  # pixels per step by which a push brings the T nearer that need not be compared
START_STEPS = 2  # until a push that begins from rest has an effect
DIRECTIONS = np.stack([np.cos(a := np.arange(16) * np.pi / 8), np.sin(a)], axis=1)
# The T's outline in its own frame, clockwise on the screen, and which of its corners point inwards.
OUTLINE = np.array(
    [(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], dtype=float
)
INWARD = (3, 6)
CENTRE = np.array([0.0, 45.0])  # of its mass
GYRATION = 3000.0  # its moment of inertia per mass


def _contacts(spacing: float = 10.0) -> tuple[np.ndarray, np.ndarray]:
    """Points of the outline where the agent can touch it, (N, 2), and their normals to the outside."""
    points, normals = [], []
    for i, (a, b) in enumerate(zip(OUTLINE, np.roll(OUTLINE, -1, axis=0), strict=True)):
        length = np.linalg.norm(b - a)
        along = (b - a) / length
        # The agent does not fit into an inward corner, and slides off an outward one.
        first = RADIUS + 1 if i in INWARD else 3.0
        last = length - (RADIUS + 1 if (i + 1) % len(OUTLINE) in INWARD else 3.0)
        for s in np.linspace(first, last, max(2, int((last - first) / spacing) + 1)):
            points.append(a + s * along)
            normals.append((along[1], -along[0]))
    return np.array(points), np.array(normals, dtype=float)


CONTACTS, NORMALS = _contacts()


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


class PushPlanner:
    """A controller of PushT that sees the simulator's state.

    Args:
        env: an unwrapped `gym_pusht` environment.
    """

    def __init__(self, env: Any) -> None:
        from gym_pusht.envs.pusht import PushTEnv

        self.env, self.copy = env, PushTEnv()
        self.copy.reset(seed=0)
        self._goal = OUTLINE @ _rotation(env.goal_pose[2]).T + env.goal_pose[:2]
        self._pose, self._pushes, self._graph = None, None, None

    def act(self) -> np.ndarray:
        """(2,) target of the agent, in pixels."""
        agent = np.array(self.env.agent.position)
        pose = np.array([*self.env.block.position, self.env.block.angle])
        rate, target = self._push_from(agent, pose)
        if rate >= GOOD_RATE:
            return target
        if self._pose is None or np.abs(pose - self._pose).max() > 1e-3:
            self._pose, self._graph = pose, self._walk_graph(pose)
            self._pushes = self._pushes_around(pose)
        starts, gains = self._pushes
        distances, came_from, here = self._walks(agent)
        nodes = self._node(starts)
        steps = distances[nodes] / (STRIDE / 2) + START_STEPS + np.arange(1, PUSH_STEPS + 1)[:, None]
        rates = (gains.T / steps).max(0)
        best = int(np.argmax(rates))
        if rate >= 0.9 * rates[best]:
            return target
        return self._along(nodes[best], came_from, here, agent, starts[best])

    # Pushes

    def _error(self, place: Any, angle: float) -> float:
        """Mean distance in pixels of the T's corners from where they should be."""
        off = OUTLINE @ _rotation(angle).T + place - self._goal
        return float(np.sqrt((off * off).sum(1)).mean())

    def _try(self, agent: np.ndarray, velocity: Any, pose: np.ndarray, direction: Any, lead: float) -> Any:
        """By how much a push lowers the T's error, after each step of it: (PUSH_STEPS,)."""
        copy = self.copy
        copy.agent.position, copy.agent.velocity = tuple(agent), tuple(velocity)
        copy.block.angle = pose[2]  # turns it about its centre of mass, so the place comes after it
        copy.block.position = tuple(pose[:2])
        copy.block.velocity, copy.block.angular_velocity = (0, 0), 0
        copy.space.reindex_shapes_for_body(copy.block)
        copy.space.reindex_shapes_for_body(copy.agent)
        before, gains = self._error(pose[:2], pose[2]), np.full(PUSH_STEPS, -np.inf)
        for step in range(PUSH_STEPS):
            x, y = copy.agent.position
            self._step(x + lead * direction[0], y + lead * direction[1])
            gains[step] = before - self._error(copy.block.position, copy.block.angle)
            best = gains[: step + 1].max()
            if gains[step] < best - 3 or (step >= 5 and best < 0.5):
                break
        return gains

    def _step(self, x: float, y: float) -> None:
        """A control step of the copy, as `PushTEnv.step` does it, without its pictures."""
        copy = self.copy
        dt = 2 * copy.dt  # enough for a plan
        for _ in range(int(1 / (dt * copy.control_hz))):
            (px, py), (vx, vy) = copy.agent.position, copy.agent.velocity
            copy.agent.velocity = (
                vx + (copy.k_p * (x - px) - copy.k_v * vx) * dt,
                vy + (copy.k_p * (y - py) - copy.k_v * vy) * dt,
            )
            copy.space.step(dt)

    def _push_from(self, agent: np.ndarray, pose: np.ndarray) -> tuple[float, np.ndarray]:
        """(rate, target) of the best push from where the agent is; -inf away from the T."""
        if self._distance(agent[None], pose)[0] > RADIUS + 2 * CLEARANCE:
            return -np.inf, agent
        points, normals, _ = self._contacts_at(pose)
        inwards = -normals[np.linalg.norm(points + (RADIUS + CLEARANCE) * normals - agent, axis=1) < CELL]
        velocity, steps = self.env.agent.velocity, np.arange(1, PUSH_STEPS + 1)
        touching = self._distance(agent + 8 * DIRECTIONS, pose) < RADIUS
        tried = [
            ((self._try(agent, velocity, pose, direction, lead) / steps).max(), agent + lead * direction)
            for lead in self._leads(pose)
            for direction in (*DIRECTIONS[touching], *inwards)
        ]
        if not tried:
            return -np.inf, agent
        return max(tried, key=lambda push: push[0])

    def _leads(self, pose: np.ndarray) -> list[float]:
        error = self._error(pose[:2], pose[2])
        return [lead for lead, from_, to in LEADS if from_ <= error < to]

    def _contacts_at(self, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Contacts and normals with the T at a pose, (N, 2), and an estimate of what pushes there gain: the T
        moves along the push and turns by its lever."""
        turn = _rotation(pose[2]).T
        points, normals = CONTACTS @ turn + pose[:2], NORMALS @ turn
        centre = CENTRE @ turn + pose[:2]
        corners = OUTLINE @ turn + pose[:2]
        arms, wanted = points - centre, self._goal - corners
        wanted = wanted / np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-6)
        lever = arms[:, 1] * normals[:, 0] - arms[:, 0] * normals[:, 1]  # arm × inward normal
        spin = lever / GYRATION
        around = np.stack([-(corners - centre)[:, 1], (corners - centre)[:, 0]], axis=1)
        gain = -normals @ wanted.mean(0) + spin * (around * wanted).sum(1).mean()
        return points, normals, gain / (1 + lever * spin)

    def _pushes_around(self, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places from which to push, (N, 2), and what the pushes gain, (N, PUSH_STEPS)."""
        points, normals, estimates = self._contacts_at(pose)
        starts = points + (RADIUS + CLEARANCE) * normals
        inside = ((starts > RADIUS + 8) & (starts < 512 - RADIUS - 8)).all(1)
        tried = np.argsort(np.where(inside, -estimates, np.inf))[:TRIED]
        gains = [
            [self._try(starts[i], (0, 0), pose, -normals[i], lead) for i in tried]
            for lead in self._leads(pose)
        ]
        return starts[tried], np.max(gains, axis=0)

    # Walks

    @staticmethod
    def _distance(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Distances of points (N, 2) from the T; 0 inside."""
        local = (points - pose[:2]) @ _rotation(pose[2])
        boxes = ((-60, 0, 60, 30), (-15, 30, 15, 120))
        gaps = [
            np.hypot(
                np.maximum(np.maximum(x0 - local[:, 0], local[:, 0] - x1), 0),
                np.maximum(np.maximum(y0 - local[:, 1], local[:, 1] - y1), 0),
            )
            for x0, y0, x1, y1 in boxes
        ]
        return np.minimum(*gaps)

    @staticmethod
    def _node(points: np.ndarray) -> np.ndarray:
        side = 512 // CELL
        cells = np.clip((points / CELL).astype(int), 0, side - 1)
        return cells[:, 1] * side + cells[:, 0]

    def _walk_graph(self, pose: np.ndarray) -> Any:
        """Costs of steps between neighbouring cells: their length, and more where the agent would touch."""
        from scipy.sparse import csr_matrix

        side = 512 // CELL
        y, x = np.divmod(np.arange(side * side), side)
        centres = (np.stack([x, y], axis=1) + 0.5) * CELL
        missing = np.maximum(RADIUS + CLEARANCE - 1 - self._distance(centres, pose), 0)
        wall = RADIUS + 6
        near_wall = np.maximum(wall - np.minimum(centres, 512 - centres).min(1), 0)
        cost = 1 + 3 * missing + 3 * near_wall
        rows, columns, weights = [], [], []
        for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1)):
            ok = (x + dx < side) & (y + dy >= 0) & (y + dy < side)
            a = np.flatnonzero(ok)
            b = a + dy * side + dx
            rows.append(a)
            columns.append(b)
            weights.append(CELL * np.hypot(dx, dy) * (cost[a] + cost[b]) / 2)
        shape = (side * side, side * side)
        return csr_matrix(
            (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=shape
        )

    def _walks(self, agent: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        from scipy.sparse.csgraph import dijkstra

        here = int(self._node(agent[None])[0])
        distances, came_from = dijkstra(self._graph, directed=False, indices=here, return_predecessors=True)
        return distances, came_from, here

    def _along(
        self, node: int, came_from: np.ndarray, here: int, agent: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        """The point of the walk to a node that is a stride away."""
        path = [end]
        while node != here and node >= 0:
            path.append((np.array([node % (512 // CELL), node // (512 // CELL)]) + 0.5) * CELL)
            node = came_from[node]
        points = np.array(path[::-1])
        far = np.flatnonzero(np.linalg.norm(points - agent, axis=1) >= STRIDE)
        return points[far[0]] if len(far) else end
