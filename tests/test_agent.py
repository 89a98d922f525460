import gymnasium
import numpy as np
import pytest
import torch
from conftest import make_batch, observation, randomise
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lerobot.configs import NormalizationMode

import lerobot_vla0


@pytest.fixture
def checkpoint(policy, processors, tmp_path):
    randomise(policy)
    policy.save_pretrained(tmp_path)
    for processor in processors:
        processor.save_pretrained(tmp_path)
    return tmp_path


def images(batch: dict) -> dict[str, np.ndarray]:
    """The batch's cameras as environments give them: HWC uint8."""
    return {
        key.split(".")[-1]: (value * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for key, value in batch.items()
        if key.startswith("observation.images")
    }


def test_equals_the_policy_with_its_processors(checkpoint, policy, processors):
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu")
    batch = observation(make_batch(rows=3))
    pixels = images(batch)
    for key in pixels:  # what the environment's 8 bits leave of the batch
        batch[f"observation.images.{key}"] = torch.from_numpy(pixels[key]).permute(0, 3, 1, 2) / 255
    expected = processors[1](policy.predict_action_chunk(processors[0](batch)))
    state, tasks = batch["observation.state"].numpy(), batch["task"]
    for step in range(2):
        actions = agent.act({"pixels": pixels, "agent_pos": state}, tasks)
        assert actions.shape == (3, 7) and actions.dtype == np.float32
        assert np.allclose(actions, expected[:, step])
    agent.reset()
    single = agent.act({"pixels": {k: v[0] for k, v in pixels.items()}, "agent_pos": state[0]}, tasks[0])
    assert single.shape == (7,) and np.allclose(single, expected[0, 0])
    agent.reset()
    flat = {f"observation.images.{k}": v for k, v in pixels.items()} | {"observation.state": state}
    assert np.allclose(agent.act(flat, tasks), expected[:, 0])


def test_overrides(checkpoint):
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu", n_action_steps=2)
    batch = observation(make_batch(rows=1))
    agent.act({"pixels": images(batch), "agent_pos": batch["observation.state"].numpy()}, batch["task"])
    assert agent.policy.config.n_action_steps == 2 and len(agent.policy._action_queue[0].actions) == 1


def test_chunks_of_environments_that_differ_in_progress(checkpoint):
    """The second environment joins when the first has had a chunk; each gets what it gets alone, also with
    earlier chunks averaged in."""
    settings = {"device": "cpu", "n_action_steps": 2, "ensemble_size": 2}
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, **settings)
    alone = [lerobot_vla0.Agent.from_pretrained(checkpoint, **settings) for _ in range(2)]
    episodes = [agent.policy.decoder.new_episodes(2)[0] for _ in range(2)]
    for seed, playing in enumerate([[0], [0, 1], [1, 0]]):
        batch = observation(make_batch(rows=2, seed=seed))
        seen = {"pixels": images(batch), "agent_pos": batch["observation.state"].numpy()}
        rows = {
            "pixels": {key: image[playing] for key, image in seen["pixels"].items()},
            "agent_pos": seen["agent_pos"][playing],
        }
        tasks = [batch["task"][row] for row in playing]
        chunks = agent.act_chunk(rows, tasks, [episodes[row] for row in playing])
        assert chunks.shape == (len(playing), 2, 7) and chunks.dtype == np.float32
        for row, chunk, task in zip(playing, chunks, tasks, strict=True):
            one = {
                "pixels": {k: v[row] for k, v in seen["pixels"].items()},
                "agent_pos": seen["agent_pos"][row],
            }
            assert np.allclose(chunk, [alone[row].act(one, task) for _ in range(2)])


def test_images_in_the_wrong_form(checkpoint):
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu")
    with pytest.raises(ValueError, match="image 'image' must be a uint8 array .* got float32"):
        agent.act({"pixels": {"image": np.zeros((64, 64, 3), np.float32)}}, "go")
    with pytest.raises(ValueError, match="lacks the camera images"):
        agent.act({"pixels": {"image": np.zeros((64, 64, 3), np.uint8)}}, "go")


def test_overrides_are_python_values(checkpoint):
    cameras = ["observation.images.image2", "observation.images.image"]
    mapping = {"VISUAL": "IDENTITY", "STATE": NormalizationMode.MIN_MAX, "ACTION": "MIN_MAX"}
    values = {"stream": True, "draft_length": None, "cameras": cameras, "normalization_mapping": mapping}
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu", **values)
    for name, value in values.items():
        assert getattr(agent.policy.config, name) == value
    again = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu", draft_length=3, cameras=None)
    assert (again.policy.config.draft_length, again.policy.config.cameras) == (3, None)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"nact": 3}, TypeError, "nact=3: VLA0Config has no field 'nact'. The nearest is 'n_act"),
        ({"chunksize": 3}, TypeError, "The nearest is 'chunk_size'"),
        ({"n_action_steps": 16}, ValueError, "n_action_steps=16 is not allowed: it must be in 1..chunk_size"),
    ],
)
def test_overrides_that_are_refused(overrides, error, message, checkpoint):
    with pytest.raises(error, match=message):
        lerobot_vla0.Agent.from_pretrained(checkpoint, **overrides)


@pytest.mark.parametrize("path", ["outputs/mistyped/pretrained_model", "mistyped folder"])
def test_a_folder_that_is_not_there(path):
    with pytest.raises(FileNotFoundError, match=f"'{path}' is neither a folder nor a Hub repo"):
        lerobot_vla0.Agent.from_pretrained(path)


def picture(*shape: int) -> dict:
    return {name: np.zeros((*shape, 64, 64, 3), np.uint8) for name in ("image", "image2")}


@pytest.mark.parametrize(
    ("seen", "task", "message"),
    [
        ({"pixels": picture()}, None, "task=None must be the instruction"),
        ({"pixels": picture(2)}, ["go", None], "must be the instruction, or one per environment"),
        ({"pixels": picture(2)}, ["go"], r"2 of .*images.image, .* and there is 1 task"),
        ({"pixels": picture()}, ["go", "stop"], r"those of one environment, and there is 2 task"),
        (picture()["image"], "go", r"must be a dict with 'pixels', got ndarray.*{'pixels': observation}"),
        # Of one environment with gymnasium.wrappers.FrameStackObservation.
        ({"pixels": picture(4), "agent_pos": np.zeros((4, 8))}, "go", "Stacked frames of one environment"),
        ({"pixels": picture(2, 4)}, ["go", "go"], r"'image' must be a uint8 array .* got uint8 \(2, 4, 64"),
        (
            {"pixels": {"image": picture(2)["image"], "image2": picture()["image"]}},
            ["go"] * 2,
            "1 of .*image2",
        ),
    ],
)
def test_observations_that_are_refused(seen, task, message, checkpoint):
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu")
    with pytest.raises(ValueError, match=message):
        agent.act(seen, task)


def test_state_that_is_missing_or_stacked(checkpoint):
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu", use_state=True)
    with pytest.raises(ValueError, match=r"needs 'agent_pos' .* and the observation has \['pixels'\]"):
        agent.act({"pixels": picture()}, "go")
    with pytest.raises(ValueError, match=r"'agent_pos' must have 1 rows, one per environment, got \(4, 8\)"):
        agent.act({"pixels": picture(), "agent_pos": np.zeros((4, 8))}, "go")
    assert agent.act({"pixels": picture(), "agent_pos": np.zeros(8)}, "go").shape == (7,)


class Counting(gymnasium.Env):
    """Its pictures show which observation they are; it notes the actions that it gets at each."""

    observation_space = gymnasium.spaces.Dict(
        {
            "pixels": gymnasium.spaces.Dict(
                {name: gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8) for name in ("image", "image2")}
            )
        }
    )
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (7,), np.float32)

    def __init__(self, first: int, lengths: list[int]) -> None:
        self.count, self.lengths = first - 1, iter(lengths)
        self.episodes: list[list[tuple[int, np.ndarray]]] = []

    def _show(self) -> dict:
        self.count += 1
        shades = np.random.default_rng(self.count).integers(256, size=(2, 3), dtype=np.uint8)
        images = (np.broadcast_to(shade, (64, 64, 3)).copy() for shade in shades)
        return {"pixels": dict(zip(("image", "image2"), images, strict=True))}

    def reset(self, **_):
        self.episodes.append([])
        self.left = next(self.lengths)
        return self._show(), {}

    def step(self, action):
        self.episodes[-1].append((self.count, action.copy()))
        self.left -= 1
        return self._show(), 0.0, self.left == 0, False, {}


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_loop_never_acts_on_the_plan_of_an_earlier_episode(mode, checkpoint):
    """The loops of libero/README.md: in each episode the first action, and every third, is the first of a
    plan from the observation at which it is executed."""
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu", n_action_steps=3)
    envs = [Counting(0, [2, 4, 1, 9]), Counting(100, [4, 3, 9])]
    vector = SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=mode)
    tasks = ["go", "stop"]
    seen, _ = vector.reset()
    agent.reset()
    ended = np.zeros(2, dtype=bool)
    for _ in range(10):
        seen, _, terminated, truncated, _ = vector.step(agent.act(seen, tasks))
        if mode is AutoresetMode.NEXT_STEP:
            agent.reset(ended)
        ended = terminated | truncated
        if mode is AutoresetMode.SAME_STEP:
            agent.reset(ended)
    for env, task in zip(envs, tasks, strict=True):
        assert len(env.episodes) > 2
        for episode in env.episodes:
            for step, (count, action) in enumerate(episode):
                if step % 3 == 0:
                    agent.reset()
                    fresh = Counting(count, [1])
                    expected = [agent.act(fresh._show(), task) for _ in range(3)]
                assert np.allclose(action, expected[step % 3])
