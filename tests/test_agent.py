import numpy as np
import pytest
import torch
from conftest import make_batch, observation, randomise

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


def test_images_in_the_wrong_form(checkpoint):
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint, device="cpu")
    with pytest.raises(ValueError, match="image 'image' must be a uint8 array .* got float32"):
        agent.act({"pixels": {"image": np.zeros((64, 64, 3), np.float32)}}, "go")
    with pytest.raises(ValueError, match="lacks the camera images"):
        agent.act({"pixels": {"image": np.zeros((64, 64, 3), np.uint8)}}, "go")
