import gymnasium
import numpy as np
import pytest
import torch
from conftest import make_batch, make_config, make_stats, observation, randomise
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lerobot_vla0 import Agent
from lerobot_vla0.decoding.decoder import Plan


@pytest.fixture(scope="module")
def checkpoint(tiny_vlm, tmp_path_factory):
    from lerobot_vla0.modeling_vla0 import VLA0Policy
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    folder = tmp_path_factory.mktemp("agent")
    policy = VLA0Policy(make_config(tiny_vlm))
    randomise(policy)
    for part in (policy, *make_vla0_pre_post_processors(policy.config, make_stats())):
        part.save_pretrained(folder)
    return folder


def images(batch: dict) -> dict[str, np.ndarray]:
    """The batch's cameras as environments return them: HWC uint8."""
    return {
        key.split(".")[-1]: (value * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for key, value in batch.items()
        if key.startswith("observation.images")
    }


def test_equals_the_policy_with_its_processors(checkpoint):
    agent = Agent.from_pretrained(checkpoint, device="cpu")
    batch = observation(make_batch(rows=3))
    pixels, state, tasks = images(batch), batch["observation.state"].numpy(), batch["task"]
    for key in pixels:  # what the environment's 8 bits leave of the batch
        batch[f"observation.images.{key}"] = torch.from_numpy(pixels[key]).permute(0, 3, 1, 2) / 255
    expected = agent.postprocess(agent.policy.predict_action_chunk(agent.preprocess(batch)))
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


def test_chunks_of_environments_that_differ_in_progress(checkpoint):
    """The second environment joins when the first has had a chunk; each gets what it gets alone, also with
    earlier chunks averaged in."""
    settings = {"device": "cpu", "n_action_steps": 2, "ensemble_size": 2}
    agent = Agent.from_pretrained(checkpoint, **settings)
    alone = [Agent.from_pretrained(checkpoint, **settings) for _ in range(2)]
    plans = [Plan(), Plan()]
    for seed, playing in enumerate([[0], [0, 1], [1, 0]]):
        batch = observation(make_batch(rows=2, seed=seed))
        pixels, state = images(batch), batch["observation.state"].numpy()
        rows = {"pixels": {key: image[playing] for key, image in pixels.items()}, "agent_pos": state[playing]}
        tasks = [batch["task"][row] for row in playing]
        chunks = agent.act_chunk(rows, tasks, [plans[row] for row in playing])
        assert chunks.shape == (len(playing), 2, 7) and chunks.dtype == np.float32
        for row, chunk, task in zip(playing, chunks, tasks, strict=True):
            single = {"pixels": {k: v[row] for k, v in pixels.items()}, "agent_pos": state[row]}
            assert np.allclose(chunk, [alone[row].act(single, task) for _ in range(2)])


def test_overrides(checkpoint, tmp_path):
    cameras = ["observation.images.image2", "observation.images.image"]
    agent = Agent.from_pretrained(checkpoint, device="cpu", n_action_steps=2, cameras=cameras)
    assert (agent.policy.config.n_action_steps, agent.policy.config.cameras) == (2, cameras)
    with pytest.raises(TypeError, match="'nact'"):
        Agent.from_pretrained(checkpoint, nact=3)
    with pytest.raises(FileNotFoundError, match="mistyped' is neither a folder nor a Hub repo"):
        Agent.from_pretrained(tmp_path / "mistyped")


def picture(*shape: int) -> dict:
    return {name: np.zeros((*shape, 64, 64, 3), np.uint8) for name in ("image", "image2")}


@pytest.mark.parametrize(
    ("seen", "task", "message"),
    [
        ({"pixels": picture(2), "agent_pos": np.zeros((2, 8))}, ["go"], "'task': 1} rows"),
        ({"pixels": picture(4), "agent_pos": np.zeros((4, 8))}, "go", "Of stacked frames, pass the newest"),
        ({"pixels": picture(), "agent_pos": np.zeros((4, 8))}, "go", "'observation.state': 4"),
        ({"pixels": picture()}, "go", r"needs 'agent_pos' .* and has \['pixels'\]"),
        (picture()["image"], "go", r"must be a dict with 'pixels', got ndarray.*{'pixels': observation}"),
    ],
)
def test_observations_that_are_refused(seen, task, message, checkpoint):
    agent = Agent.from_pretrained(checkpoint, device="cpu", use_state=True)
    with pytest.raises(ValueError, match=message):
        agent.act(seen, task)


class Counting(gymnasium.Env):
    """Its pictures are different at every observation; it notes the actions that it gets at each."""

    camera = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    cameras = gymnasium.spaces.Dict({"image": camera, "image2": camera})
    observation_space = gymnasium.spaces.Dict({"pixels": cameras})
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (7,), np.float32)

    def __init__(self, first: int, lengths: list[int]) -> None:
        self.count, self.lengths = first - 1, iter(lengths)
        self.episodes: list[list[tuple[int, np.ndarray]]] = []

    def observe(self) -> dict:
        self.count += 1
        shades = np.random.default_rng(self.count).integers(256, size=(2, 3), dtype=np.uint8)
        frames = (np.broadcast_to(shade, (64, 64, 3)).copy() for shade in shades)
        return {"pixels": dict(zip(("image", "image2"), frames, strict=True))}

    def reset(self, **_):
        self.episodes.append([])
        self.left = next(self.lengths)
        return self.observe(), {}

    def step(self, action):
        self.episodes[-1].append((self.count, action.copy()))
        self.left -= 1
        return self.observe(), 0.0, self.left == 0, False, {}


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_loop_never_acts_on_the_chunk_of_an_earlier_episode(mode, checkpoint):
    """The loops of `Agent`: in each episode the first action, and every third, is the first of a chunk that
    was predicted from the observation at which it is executed."""
    agent = Agent.from_pretrained(checkpoint, device="cpu", n_action_steps=3)
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
            agent.reset(np.flatnonzero(ended))  # indices, as good as a mask
    for env, task in zip(envs, tasks, strict=True):
        assert len(env.episodes) > 2
        for episode in env.episodes:
            for step, (count, action) in enumerate(episode):
                if step % 3 == 0:
                    agent.reset()
                    fresh = Counting(count, [1])
                    expected = [agent.act(fresh.observe(), task) for _ in range(3)]
                assert np.allclose(action, expected[step % 3])
