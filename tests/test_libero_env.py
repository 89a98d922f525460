import multiprocessing
import os
import sys
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import pytest
from conftest import shared
from draccus.utils import DecodingError
from lerobot.envs.configs import EnvConfig

from lerobot_vla0.libero import VLA0LiberoEnv
from lerobot_vla0.libero.suites import MAX_STEPS

ID = "lerobot_vla0/Libero-v0"
SMALL = {"image_size": 32, "assets": "primitive"}
pytestmark = pytest.mark.usefixtures("throw_away")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_foo"}, "unknown LIBERO suite 'libero_foo'. Known: libero_spatial, libero_object"),
        ({"suite": "libero_90", "task_id": 90}, r"libero_90 has the tasks 0..89, not \[90\]"),
        ({"image_size": 10**9}, r"image_size=1000000000 must be in 1\.\.2048"),
        ({"cameras": ["image", "wrist"]}, r"cameras=.* must be one or more of \['image', 'image2'\]"),
        ({"cameras": []}, r"cameras=\[\] must be one or more"),
    ],
)
def test_settings_that_no_environment_has(arguments, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make(ID, **arguments)


class Simulator:
    """In place of LeRobot's environment: an episode without end."""

    task_description, _init_states, _env, _task_bddl_file = "wait", range(50), None, ""
    action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)

    def __init__(self, *_, observation_height=16, **settings):
        self.image = np.zeros((observation_height, observation_height, 3), np.uint8)
        eef, gripper = {"pos": np.zeros(3), "quat": np.array([0, 0, 0, 1.0])}, {"qpos": np.zeros(2)}
        self.observation = {"robot_state": {"eef": eef, "gripper": gripper}}

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
    inner = SimpleNamespace(env=SimpleNamespace(parsed_problem={"goal_state": []}))
    monkeypatch.setattr(env, "make_simulator", lambda file, size, freq: (inner, Simulator(size)))
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


def test_chunks_end_at_the_step_limit_or_where_the_caller_says(simulator):
    env = simulator.LiberoEnv(image_size=16, max_episode_steps=10)
    for _ in range(2):
        env.reset()
        untils = (None, None, iter([False, True]).__next__, None)
        done = [
            env.step_chunk(np.zeros((n, 7)), until) for n, until in zip((1, 4, 8, 8), untils, strict=True)
        ]
        ends = [(info["steps"], truncated) for *_, truncated, info in done]
        assert ends == [(1, False), (4, False), (2, False), (3, True)]


@pytest.mark.parametrize("actions", [np.zeros((0, 7)), np.zeros((2, 6)), np.full((1, 7), np.nan)])
def test_actions_that_are_no_chunk(actions, simulator):
    env = simulator.LiberoEnv(image_size=16)
    env.reset()
    with pytest.raises(ValueError, match="actions must be finite, \\(n, 7\\) with n >= 1; got"):
        env.step_chunk(actions)


def test_unknown_init_state(simulator):
    with pytest.raises(ValueError, match="init_state=50 must be in 0..49"):
        simulator.LiberoEnv(image_size=16, init_state=50).reset()


def test_processes_that_may_render(simulator):
    """A process that is forked after this one has rendered is refused at once; before, it renders itself."""
    env = simulator.LiberoEnv(image_size=16)
    assert forked_reset(env) == "rendered"
    for _ in range(2):
        env.reset(seed=0)
    after = forked_reset(env)
    assert f"forked from process {os.getpid()} after that one had rendered" in after
    assert 'vector_kwargs={"context": "spawn"}' in after


def forked_reset(env) -> str:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def reset():
        try:
            env.reset(seed=0)
            answers.put("rendered")
        except Exception as error:
            answers.put(str(error))

    process = context.Process(target=reset)
    process.start()
    process.join(timeout=60)
    return answers.get()


@pytest.mark.slow
def test_episode():
    """Gymnasium's own checks; seeds decide the initial state; the step limit truncates."""
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make(ID, task_id=7, max_episode_steps=2, **SMALL)
    try:
        check_env(env.unwrapped)
        first, info = env.reset(seed=3)
        assert info.items() >= {"is_success": False, "task_id": 7}.items() and "the milk" in info["task"]
        assert first["agent_pos"].dtype == np.float32 and first["pixels"]["image"].shape == (32, 32, 3)
        action = np.array([0.5, 0, 0, 0, 0, 0, -1], dtype=np.float32)
        moved = env.step(action)[0]
        assert moved["agent_pos"][0] > first["agent_pos"][0] + 0.001  # forward is +x
        *_, truncated, info = env.step(action)
        assert truncated and not info["is_success"]
        again, other_info = env.reset(seed=3)
        assert other_info == info
        assert same(again, first)
        chosen, info = env.reset(options={"init_state": 11})
        assert info["init_state"] == 11 and not same(chosen, first)
        assert np.array_equal(env.render(), chosen["pixels"]["image"])
    finally:
        env.close()


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
        actions = np.stack([dataset[i]["action"].numpy() for i in range(len(dataset))])
        *_, terminated, _, info = env.unwrapped.step_chunk(actions)
        assert terminated and info["is_success"]
    finally:
        env.close()


def same(one: dict, other: dict) -> bool:
    pairs = [(one["pixels"][key], other["pixels"][key]) for key in ("image", "image2")]
    return all(np.array_equal(*pair) for pair in [*pairs, (one["agent_pos"], other["agent_pos"])])


def test_draws_only_the_cameras_asked_for(simulator, monkeypatch):
    drawn = []
    monkeypatch.setattr(Simulator, "draw", lambda self, name: drawn.append(name) or self.image)
    env = simulator.LiberoEnv(image_size=16, cameras=["image2"])
    observation, _ = env.reset()
    assert list(observation["pixels"]) == ["image2"] and env.render().shape == (16, 16, 3)
    assert env.observation_space.contains(observation) and drawn == ["robot0_eye_in_hand"]


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
    settings = {"obs_type": "pixels_agent_pos", "observation_width": 32, "observation_height": 32}
    other = LeRobotLiberoEnv(_get_suite(suite), task, suite, **settings)
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
                cameras._record_scene(name, {})
                picture, drawn = cameras.draw(name), cameras._scenes[name].ngeom
                cameras._outside = lambda camera, name: np.zeros(model.ngeom, bool)
                cameras._record_scene(name, {})
                assert np.array_equal(cameras.draw(name), picture)
                assert (drawn < cameras._scenes[name].ngeom) == (not mirror)
                cameras._outside = outside
        assert set(model.geom_group) == {0, 1}  # as before
    finally:
        env.close()


def test_is_registered_with_the_papers_settings():
    assert EnvConfig.get_choice_class("vla0_libero") is VLA0LiberoEnv
    config = VLA0LiberoEnv(camera_name="robot0_eye_in_hand_image")
    assert (config.features["pixels/image2"].shape, config.fps) == ((256, 256, 3), 20)
    assert config.features_map["pixels/image2"] == "observation.images.image2"
    assert config.features_map["agent_pos"] == "observation.state" and "pixels/image" not in config.features
    assert list(MAX_STEPS.values()) == [220, 280, 300, 520, 400]
    with pytest.raises(
        DecodingError, match="Known: libero_spatial, libero_object, libero_goal, libero_10, lib"
    ):
        VLA0LiberoEnv(task="libero_object,libero_foo")
    with pytest.raises(DecodingError, match="observation_height=64 and observation_width=256 differ"):
        VLA0LiberoEnv(observation_height=64)


@pytest.mark.slow
def test_vector_of_lerobots_scripts():
    """Initial states in turn, whatever the seed; an environment that has ended waits, and uses up none."""
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION

    config = VLA0LiberoEnv(task_ids=[0], observation_height=32, observation_width=32, assets="primitive")
    env = config.create_envs(n_envs=2)["libero_object"][0]
    alone = gymnasium.make(ID, cameras=["image2"], **SMALL)  # which sees what it sees beside the other
    try:
        assert env.call("_max_episode_steps") == (280, 280)
        assert env.unwrapped.metadata["render_fps"] == 20
        observation, info = env.reset(seed=[3, 4], options={NEW_ROLLOUT_OPTION: True})
        assert info["init_state"].tolist() == [0, 1]
        expected, _ = alone.reset(options={"init_state": 1})
        assert np.array_equal(observation["pixels"]["image2"][1], expected["pixels"]["image2"])
        assert np.array_equal(observation["agent_pos"][1], expected["agent_pos"])
        env.envs[0].unwrapped._env._env.check_success = lambda: True
        for step in range(3):  # the second is Gymnasium's automatic reset
            _, _, terminated, _, info = env.step(np.zeros((2, 7), dtype=np.float32))
            assert terminated.tolist() == [step != 1, False] and info["init_state"].tolist() == [0, 1]
        _, info = env.reset(options={NEW_ROLLOUT_OPTION: True})
        assert info["init_state"].tolist() == [2, 3]
    finally:
        env.close()
        alone.close()
