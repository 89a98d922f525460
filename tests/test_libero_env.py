import multiprocessing
import os
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import pytest
from conftest import run_script, shared

import lerobot_vla0  # noqa: F401  (registers the id)

ID = "lerobot_vla0/Libero-v0"
SMALL = {"image_size": 32, "assets": "primitive"}
pytestmark = pytest.mark.usefixtures("throw_away")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_foo"}, "unknown LIBERO suite 'libero_foo'. Known: libero_spatial, libero_object"),
        ({"task_id": 10}, r"libero_object has the tasks 0..9, not \[10\]"),
        ({"suite": "libero_90", "task_id": 90}, r"libero_90 has the tasks 0..89, not \[90\]"),
    ],
)
def test_unknown_suite_or_task(arguments, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make(ID, **arguments)


class Simulator:
    """In place of LeRobot's environment: an episode without end."""

    task_description, _init_states, _env, _task_bddl_file = "wait", range(50), None, ""
    action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)

    def __init__(self, observation_height, **_):
        self.image = np.zeros((observation_height, observation_height, 3), np.uint8)
        eef = {"pos": np.zeros(3), "quat": np.array([0, 0, 0, 1.0]), "mat": np.eye(3)}
        joints = {"pos": np.zeros(7), "vel": np.zeros(7)}
        gripper = {"qpos": np.zeros(2), "qvel": np.zeros(2)}
        self.observation = {"robot_state": {"eef": eef, "gripper": gripper, "joints": joints}}

    def draw(self, name):
        return self.image

    def reset(self, seed):
        return self.observation, {}

    def step(self, action):
        assert action.shape == (7,) and action.dtype == np.float32
        return self.observation, 0.0, False, False, {"is_success": False}

    def close(self):
        pass


@pytest.fixture
def simulator(monkeypatch):
    from lerobot_vla0.libero import env

    module = ModuleType("lerobot.envs.libero")
    module.LiberoEnv, module._get_suite = Simulator, lambda name: name
    monkeypatch.setitem(sys.modules, "lerobot.envs.libero", module)
    monkeypatch.setattr(env, "prepare_libero", lambda suite, assets: None)
    inner = SimpleNamespace(env=SimpleNamespace(parsed_problem={}))
    monkeypatch.setattr(env, "make_simulator", lambda file, size, freq: (inner, Simulator(size)))
    monkeypatch.setattr(env, "goal_of", lambda suite, task_id, instruction: [])
    monkeypatch.setattr(env.LiberoEnv, "_rendering_process", None)
    return env


def steps_of(env) -> int:
    env.reset(seed=0)
    for step in range(1, 1000):
        *_, truncated, _ = env.step(np.zeros(7, dtype=np.float32))
        if truncated:
            return step
    raise AssertionError("no end")


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, 280),
        ({"max_episode_steps": 400}, 400),
        ({"max_episode_steps": 5}, 5),
        ({"max_episode_steps": -1}, 280),
        ({"suite": "libero_spatial", "max_episode_steps": 221}, 221),
    ],
)
def test_step_limit(arguments, steps, simulator):
    env = gymnasium.make(ID, image_size=16, **arguments)
    assert steps_of(env) == steps
    assert steps_of(gymnasium.make(env.spec)) == steps
    if arguments.get("max_episode_steps", 1) > 0:
        assert steps_of(simulator.LiberoEnv(image_size=16, **arguments)) == steps
    vector = gymnasium.make_vec(ID, num_envs=1, vectorization_mode="sync", image_size=16, **arguments)
    assert vector.get_attr("_max_episode_steps") == (steps,)


def test_chunks_end_at_the_step_limit(simulator):
    env = simulator.LiberoEnv(image_size=16, max_episode_steps=10)
    for _ in range(2):
        env.reset()
        done = [env.step_chunk(np.zeros((n, 7))) for n in (1, 8, 8)]
        assert [(info["steps"], truncated) for *_, truncated, info in done] == [
            (1, False),
            (8, False),
            (1, True),
        ]


def test_chunks_end_where_the_caller_says(simulator):
    env, asked = simulator.LiberoEnv(image_size=16, max_episode_steps=10), []
    env.reset()
    *_, terminated, truncated, info = env.step_chunk(
        np.zeros((8, 7)), until=lambda: asked.append(1) or len(asked) == 3
    )
    assert (terminated, truncated, info["steps"], len(asked)) == (False, False, 3, 3)
    *_, truncated, info = env.step_chunk(np.zeros((8, 7)), until=lambda: False)
    assert truncated and info["steps"] == 7


@pytest.mark.parametrize(
    "actions", [np.zeros((0, 7)), np.zeros(7), np.zeros((2, 6)), np.full((1, 7), np.nan)]
)
def test_actions_that_are_no_chunk(actions, simulator):
    env = simulator.LiberoEnv(image_size=16)
    env.reset()
    with pytest.raises(ValueError, match="actions must be finite, \\(n, 7\\) with n >= 1; got"):
        env.step_chunk(actions)


@pytest.mark.parametrize("steps", [0, -3])
def test_step_limit_below_one(steps):
    from lerobot_vla0.libero.env import LiberoEnv

    with pytest.raises(ValueError, match=f"max_episode_steps={steps} must be at least 1, or None"):
        LiberoEnv(max_episode_steps=steps)


def test_processes_that_may_render(simulator):
    """A process that is forked after this one has rendered is refused at once; before, it renders itself."""
    before = forked_reset(simulator.LiberoEnv(image_size=16))
    assert before == "rendered"
    env = gymnasium.make(ID, image_size=16)
    for _ in range(2):
        env.reset(seed=0)
    after = forked_reset(env.unwrapped)
    assert f"forked from process {os.getpid()} after that one had rendered" in after
    assert 'vector_kwargs={"context": "spawn"}' in after


def forked_reset(env) -> str:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def reset():
        try:
            env.reset(seed=0)
            answers.put("rendered")
        except RuntimeError as error:
            answers.put(str(error))

    process = context.Process(target=reset)
    process.start()
    process.join(timeout=60)
    return answers.get()


@pytest.mark.slow
def test_async_vector_after_a_reset_in_this_process(process_env, tmp_path):
    """In a process of its own, which may hang."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import gymnasium, lerobot_vla0
if __name__ == "__main__":
    settings = dict(image_size=32, assets="primitive")
    env = gymnasium.make({ID!r}, max_episode_steps=400, **settings)
    env.reset(seed=0)
    for context in (None, "spawn"):
        options = dict(vector_kwargs={{"context": context}} if context else {{}}, **settings)
        envs = gymnasium.make_vec({ID!r}, num_envs=2, vectorization_mode="async", **options)
        try:
            _, info = envs.reset(seed=[1, 2])
            print(context, "states", len(set(info["init_state"].tolist())))
        except RuntimeError as error:
            print(context, "failed:", error)
        envs.close(terminate=True)
"""
    )
    result = run_script(Path(sys.executable).name, str(script), env=process_env, timeout=240, check=False)
    assert "None failed: LiberoEnv cannot render" in result.stdout, result.stdout
    assert "spawn states 2" in result.stdout, result.stdout


@pytest.mark.slow
def test_step_limit_beyond_the_suites_in_the_simulator(no_pictures):
    env = gymnasium.make(ID, max_episode_steps=283, **SMALL)
    try:
        assert steps_of(env) == 283  # libero_object has 280
    finally:
        env.close()


@pytest.mark.slow
def test_unknown_init_state():
    with pytest.raises(ValueError, match=r"init_state=50 must be in 0..49"):
        gymnasium.make(ID, init_state=50, **SMALL)


@pytest.mark.slow
def test_gymnasiums_own_checks():
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make(ID, **SMALL).unwrapped
    try:
        check_env(env)
    finally:
        env.close()


@pytest.mark.slow
def test_episode():
    """Seeds decide the initial state; the same one gives the same images; the step limit truncates."""
    env = gymnasium.make(ID, task_id=7, max_episode_steps=2, **SMALL)
    try:
        first, info = env.reset(seed=3)
        assert info == {
            "is_success": False,
            "task": "pick up the milk and place it in the basket",
            "task_id": 7,
            "init_state": info["init_state"],
        }
        assert first["agent_pos"].dtype == np.float32 and first["pixels"]["image"].shape == (32, 32, 3)
        action = np.array([0.5, 0, 0, 0, 0, 0, -1], dtype=np.float32)
        moved = env.step(action)[0]
        assert moved["agent_pos"][0] > first["agent_pos"][0] + 0.001  # forward is +x
        *_, truncated, info = env.step(action)
        assert truncated and not info["is_success"]
        again, other_info = env.reset(seed=3)
        assert other_info["init_state"] == env.unwrapped._init_state
        for key in ("image", "image2"):
            assert np.array_equal(again["pixels"][key], first["pixels"][key])
        assert np.array_equal(again["agent_pos"], first["agent_pos"])
        chosen, info = env.reset(options={"init_state": 11})
        assert info["init_state"] == 11 and not np.array_equal(
            chosen["pixels"]["image"], first["pixels"]["image"]
        )
        assert np.array_equal(env.render(), chosen["pixels"]["image"])
    finally:
        env.close()


MILK = "pick up the milk and place it in the basket"  # task 7
BUTTER = "pick up the butter and place it in the basket"  # another of the objects in its scene


@pytest.mark.slow
def test_instruction_of_another_task(no_pictures):
    """Its goal counts where it was given, and the own one again afterwards, in the same environment."""
    from lerobot_vla0.demo.expert import PickAndPlaceExpert

    env = gymnasium.make(ID, task_id=7, init_state=1, **SMALL).unwrapped
    try:
        _, info = env.reset(options={"instruction": BUTTER})
        assert (info["task"], env.task, env.task_description, env.reached()) == (BUTTER, BUTTER, BUTTER, [])
        expert, actions, terminated = PickAndPlaceExpert(env.simulator), [], False
        while not terminated:
            actions.append(expert.act())
            _, reward, terminated, truncated, info = env.step(actions[-1])
            assert not truncated
        assert (reward, info["is_success"], info["task"], env.reached()) == (1.0, True, BUTTER, [BUTTER])

        with pytest.raises(ValueError, match="instruction='fly' has no goal in the scene of libero_object"):
            env.reset(options={"instruction": "fly"})
        _, info = env.reset()
        assert info["task"] == env.task == MILK
        *_, terminated, _, info = env.step_chunk(np.array(actions))
        assert env.reached() == [BUTTER] and info["steps"] == len(actions)
        assert not terminated and not info["is_success"]
    finally:
        env.close()

    env = gymnasium.make(ID, task_id=7, init_state=1, instruction=BUTTER, **SMALL).unwrapped
    try:
        for instruction in (MILK, BUTTER):  # the last without an option
            options = {"instruction": instruction} if instruction == MILK else None
            assert env.reset(options=options)[1]["task"] == instruction
            _, reward, terminated, _, info = env.step_chunk(np.array(actions))
            assert terminated == info["is_success"] == (reward == 1.0) == (instruction == BUTTER)
    finally:
        env.close()


@pytest.mark.slow
def test_instruction_that_the_scene_does_not_allow():
    with pytest.raises(
        ValueError, match="has no goal in the scene of libero_object, task 7. There, LIBERO know"
    ):
        gymnasium.make(ID, task_id=7, instruction="pick up the bbq sauce and place it in the basket", **SMALL)


@pytest.mark.slow
def test_recorded_actions_replayed_succeed(libero_dataset):
    """What the recorder wrote, fed back from the same initial state, solves the task, and the images that
    come back are those of the data set (orientation included)."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(f"local/{libero_dataset.name}", root=libero_dataset, episodes=[1])
    env = gymnasium.make(ID, task_id=7, init_state=1, assets="primitive")
    try:
        observation, _ = env.reset()
        recorded = dataset[0]
        image = (recorded["observation.images.image"].permute(1, 2, 0) * 255).round().byte().numpy()
        assert np.array_equal(observation["pixels"]["image"], image)
        assert np.allclose(observation["agent_pos"], recorded["observation.state"], atol=1e-6)
        terminated = False
        for i in range(len(dataset)):
            *_, terminated, _, info = env.step(dataset[i]["action"].numpy())
            if terminated:
                break
        assert terminated and info["is_success"]
    finally:
        env.close()


def same(one: dict, other: dict) -> bool:
    pairs = [(one["pixels"][key], other["pixels"][key]) for key in ("image", "image2")]
    return all(np.array_equal(*pair) for pair in [*pairs, (one["agent_pos"], other["agent_pos"])])


def test_draws_only_the_cameras_asked_for(simulator, monkeypatch):
    drawn, draw = [], Simulator.draw
    monkeypatch.setattr(Simulator, "draw", lambda self, name: drawn.append(name) or draw(self, name))
    env = simulator.LiberoEnv(image_size=16, cameras=["image2"])
    observation, _ = env.reset()
    assert list(observation["pixels"]) == ["image2"] and env.render().shape == (16, 16, 3)
    assert env.observation_space.contains(observation) and drawn == ["robot0_eye_in_hand"]


@pytest.mark.parametrize("cameras", [[], "image", ["wrist"], ["image", "image"], ["image", "image2", "x"]])
def test_unknown_cameras(cameras, simulator):
    with pytest.raises(ValueError, match=r"cameras=.* must be one or more of \['image', 'image2'\]"):
        simulator.LiberoEnv(cameras=cameras)


@pytest.mark.slow
def test_one_camera_sees_what_it_sees_beside_the_other():
    seen = []
    for cameras in (["image", "image2"], ["image2"]):
        with closing(gymnasium.make(ID, task_id=7, cameras=cameras, **SMALL)) as env:
            first, _ = env.reset(options={"init_state": 1})
            moved, *_ = env.step(np.full(7, 0.5, np.float32))
            seen.append([one["pixels"]["image2"] for one in (first, moved)])
    assert np.array_equal(*seen) and not np.array_equal(*seen[0])


@pytest.mark.slow
def test_chunks_are_single_steps():
    """The expert's episode in single steps, and again in chunks of 8: success inside a chunk, then the limit
    inside a chunk."""
    from lerobot_vla0.demo.expert import PickAndPlaceExpert
    from lerobot_vla0.libero.env import LiberoEnv

    env = LiberoEnv(task_id=7, init_state=1, max_episode_steps=400, **SMALL)
    try:
        observations, actions, terminated = [env.reset()[0]], [], False
        expert = PickAndPlaceExpert(env.simulator)
        while not terminated:
            actions.append(expert.act())
            observation, reward, terminated, _, info = env.step(actions[-1])
            observations.append(observation)
        total = len(actions)
        size = 8 if total % 8 else 7  # the last chunk must go on behind the success
        padded = np.concatenate([actions, np.zeros((size, 7), np.float32)])
        for limit in (400, 3 * size + 2):
            env._max_episode_steps = limit
            assert same(env.reset()[0], observations[0])
            for start in range(0, min(total, limit), size):
                observation, reward, terminated, truncated, info = env.step_chunk(padded[start:][:size])
                end = min(start + size, total, limit)
                assert info["steps"] == end - start
                assert same(observation, observations[end])
                assert (terminated, truncated) == (end == total, end == limit)
                assert info["is_success"] == (reward == 1.0) == (end == total)
    finally:
        env.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"), [("libero_object", 2), ("libero_goal", 7), ("libero_10", 2), ("libero_spatial", 5)]
)
def test_equals_lerobots_environment(suite, task):
    """Pictures, the robot's state and the simulator's are those of LeRobot's environment, which builds the
    model at every reset and renders at every step; also after an episode in which doors, drawers and knobs
    (of the stove, which then glows) were turned."""
    import mujoco
    from lerobot.envs.libero import LiberoEnv as LeRobotLiberoEnv
    from lerobot.envs.libero import _get_suite

    from lerobot_vla0.libero.env import LiberoEnv, agent_position
    from lerobot_vla0.libero.simulator import CHANGING_FIELDS

    assets = "primitive" if suite == "libero_object" else str(shared("libero-assets"))
    rng = np.random.default_rng(0)
    chunks = [rng.uniform(-1, 1, (n, 7)).astype(np.float32) for n in (3, 1, 5)]

    def physics(simulator) -> np.ndarray:
        data = simulator.sim.data._data
        return np.concatenate([data.qpos, data.qvel, data.qacc_warmstart])

    def model_arrays(simulator) -> dict[str, np.ndarray]:
        model = simulator.sim.model._model
        fields = {name: getattr(model, name) for name in dir(model) if name[0] != "_"}
        return {name: f.copy() for name, f in fields.items() if isinstance(f, np.ndarray) and f.size < 10**5}

    env = LiberoEnv(suite, task, image_size=32, assets=assets)
    other = LeRobotLiberoEnv(
        _get_suite(suite),
        task,
        suite,
        obs_type="pixels_agent_pos",
        observation_width=32,
        observation_height=32,
    )
    try:
        expected = []
        for init_state in (3, 4):
            other.init_state_id = init_state
            observation, _ = other.reset(seed=7)
            for chunk in ([], *chunks):
                for action in chunk:
                    observation, *_ = other.step(action)
                pixels = {key: image[::-1, ::-1] for key, image in observation["pixels"].items()}
                state = agent_position(observation["robot_state"])
                expected.append(({"pixels": pixels, "agent_pos": state}, physics(other._env)))
        other.close()
        env.reset(options={"init_state": 9})
        model, before = env.simulator.sim.model._model, model_arrays(env.simulator)
        for joint in range(model.njnt):
            name = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, joint)
            if model.jnt_limited[joint] and not name.startswith(("robot", "gripper")):
                ends = model.jnt_range[joint]
                env.simulator.sim.data._data.qpos[model.jnt_qposadr[joint]] = ends[np.abs(ends).argmax()]
        env.step_chunk(np.ones((4, 7)))
        after = model_arrays(env.simulator)
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed <= set(CHANGING_FIELDS) and bool(changed) == (suite != "libero_object")
        for init_state in (3, 4):
            observation, _ = env.reset(options={"init_state": init_state})
            for chunk in ([], *chunks):
                if len(chunk):
                    observation, *_ = env.step_chunk(chunk)
                wanted, simulated = expected.pop(0)
                assert same(observation, wanted)
                assert np.array_equal(physics(env.simulator), simulated)
    finally:
        other.close()
        env.close()


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "mirror"), [("libero_object", False), ("libero_goal", True)])
def test_shapes_outside_the_picture(suite, mirror):
    """They are not drawn, and the picture is the same as with them; but all are while a mirror (the top of
    libero_goal's stove) is in the picture, because it may show them."""
    from lerobot_vla0.libero.env import LiberoEnv

    env = LiberoEnv(suite, 2, image_size=128, assets=str(shared("libero-assets")))
    try:
        env.reset()
        cameras, rng = env._cameras, np.random.default_rng(0)
        model = cameras.sim.model._model
        outside = cameras._outside
        for _ in range(3):
            env.step_chunk(rng.uniform(-1, 1, (4, 7)))
            for name in ("agentview", "robot0_eye_in_hand"):
                cameras._note(name, {})
                picture, drawn = cameras.draw(name), cameras._scenes[name].ngeom
                cameras._outside = lambda camera, name: np.zeros(model.ngeom, bool)
                cameras._note(name, {})
                assert np.array_equal(cameras.draw(name), picture)
                assert (drawn < cameras._scenes[name].ngeom) == (not mirror)
                cameras._outside = outside
        assert set(model.geom_group) == {0, 1}  # as before
    finally:
        env.close()


@pytest.mark.slow
def test_make_vec_and_twelve_cycles_leak_nothing():
    """Environments are made and closed again and again; no GL context and no file stays open."""
    import psutil

    envs = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="sync", **SMALL)
    observation, info = envs.reset(seed=[1, 2])
    assert observation["pixels"]["image"].shape == (2, 32, 32, 3)
    assert len(set(info["init_state"].tolist())) == 2
    envs.close()
    process, memory = psutil.Process(), []
    for _ in range(12):
        env = gymnasium.make(ID, **SMALL)
        env.reset(seed=0)
        env.close()
        memory.append((process.num_fds(), process.memory_info().rss / 2**20))
    files, megabytes = zip(*memory, strict=True)
    assert files[-1] <= files[2]
    # One context of this size takes tens of megabytes: nine leaked ones would show.
    assert megabytes[-1] - megabytes[2] < 9 * 10


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_every_task_resets_and_steps(suite):
    """All 40 tasks of the paper's four suites, on LIBERO's meshes."""
    action = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)
    instructions = set()
    for task_id in range(10):
        env = gymnasium.make(
            ID, suite=suite, task_id=task_id, image_size=32, assets=str(shared("libero-assets"))
        )
        try:
            observation, info = env.reset(options={"init_state": 49})
            assert info["task_id"] == task_id and info["init_state"] == 49
            assert all(image.std() > 5 for image in observation["pixels"].values())  # not a blank picture
            observation, reward, terminated, truncated, info = env.step(action)
            assert env.observation_space.contains(observation)
            assert (reward, terminated, truncated, info["is_success"]) == (0.0, False, False, False)
            instructions.add(info["task"])
        finally:
            env.close()
    assert len(instructions) == 10
