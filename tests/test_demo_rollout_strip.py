from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomise, run_script

import lerobot_vla0
from lerobot_vla0.demo import rollout_strip
from lerobot_vla0.demo.rollout_strip import StripConfig, play_rollout, read_chat
from lerobot_vla0.demo.strip_layout import MAX_BYTES, Rollout
from lerobot_vla0.libero.results import describe_policy, save_episode


class StubEnv:
    """Three steps long. The top left pixel of the scene, as the simulator renders it, holds the step."""

    def __init__(self, success: bool) -> None:
        self.success, self.actions = success, []
        self.simulator = SimpleNamespace(sim=SimpleNamespace(render=self.render))

    def render(self, width, height, camera_name):
        assert camera_name == "agentview"
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        frame[0, 0] = len(self.actions)
        return frame

    def observation(self):
        return {"step": len(self.actions)}, {"task": "fly", "is_success": self.success}

    def reset(self):
        return self.observation()

    def step(self, action):
        self.actions.append(action)
        observation, info = self.observation()
        ended = len(self.actions) == 3
        return observation, 0.0, ended and self.success, ended and not self.success, info


class StubAgent:
    """Looks every second step, and writes (10 * step, 1), (10 * step, 2), as integers of the task's range,
    which is the lower half of the data set's."""

    def __init__(self) -> None:
        config = SimpleNamespace(ensemble_size=1, num_bins=100)
        self.policy = SimpleNamespace(config=config, decoder=SimpleNamespace(decode_chunk=self.decode))
        self.resets = 0

    def decode(self, observation, steps):
        for i in range(steps):
            yield torch.tensor([[10 * observation.step, i + 1]]) / 2

    def reset(self):
        self.resets += 1

    def act(self, observation, task):
        if observation["step"] % 2 == 0:
            task_range = torch.tensor([[[-1.0, -1.0], [0.0, 0.0]]])
            seen = SimpleNamespace(step=observation["step"], task_range=task_range)
            self.queue = list(self.policy.decoder.decode_chunk(seen, 2))
        return self.queue.pop(0)[0].tolist()


@pytest.mark.parametrize("success", [True, False])
def test_rollout(success):
    env, agent = StubEnv(success), StubAgent()
    rollout = play_rollout(agent, env)
    assert env.actions == [[0, 0.5], [0, 1], [10, 0.5]] and agent.resets == 1
    assert rollout.instruction == "fly" and rollout.success is success
    assert [observation["step"] for observation in rollout.observations] == [0, 1, 2, 3]
    # LIBERO's images are upside down: the marked corner is now at the bottom right.
    assert [frame[-1, -1, 0] for frame in rollout.frames] == [0, 1, 2, 3]
    # By the step at which they were written, as they were written.
    assert rollout.chunks == {0: [[0, 1], [0, 2]], 2: [[20, 1], [20, 2]]}
    assert agent.policy.decoder.decode_chunk == agent.decode  # as it was


class RandomEnv(StubEnv):
    """Observations of LIBERO's kind, other ones at every step."""

    def observation(self):
        rng = np.random.default_rng(len(self.actions))
        pixels = {key: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for key in ("image", "image2")}
        state = rng.uniform(-1, 1, 8).astype(np.float32)
        return {"pixels": pixels, "agent_pos": state}, {"task": "fly", "is_success": self.success}


@pytest.mark.parametrize("stream", [False, True])
def test_integers_are_those_that_were_executed(policy, processors, stream):
    randomise(policy)
    policy.config.n_action_steps, policy.config.stream = 2, stream
    env = RandomEnv(success=False)
    rollout = play_rollout(lerobot_vla0.Agent(policy, *processors), env)
    assert list(rollout.chunks) == [0, 2] and not rollout.averaged
    for step, action in enumerate(env.actions):
        chunk, executed = rollout.written_for(step)
        written = torch.tensor(chunk[executed], dtype=torch.float32)
        assert np.allclose(processors[1](written[None]).numpy()[0], action, atol=1e-5)
    assert rollout.chunks[0] != rollout.chunks[2]


def test_chat_is_what_the_policy_gets_and_wrote(learnt):
    """Its integers are not decoded again: those of a policy that samples would be others."""
    folder, batch = learnt
    agent = lerobot_vla0.Agent.from_pretrained(folder, device="cpu")
    pixels = {
        key.split(".")[-1]: (batch[key][0] * 255).round().byte().permute(1, 2, 0).numpy()
        for key in ("observation.images.image", "observation.images.image2")
    }
    observation = {"pixels": pixels, "agent_pos": batch["observation.state"][0].numpy()}
    chunks = {0: [[1, 2]], 4: [[3, 4], [5, 6]], 6: [[7, 8]]}
    rollout = Rollout(batch["task"][0], [{}] * 4 + [observation] * 3, [], chunks=chunks)
    system, user, assistant = read_chat(agent, rollout, 4)
    assert (system.role, user.role, assistant.role) == ("system", "user", "assistant")
    assert "14 integers (0-1000 each), representing the 2 timesteps" in system.parts[0]
    assert user.parts == [batch["task"][0]]
    # Both cameras side by side.
    assert len(user.pictures) == 1 and user.pictures[0].shape == (56, 112, 3)
    assert np.array_equal(user.pictures[0], np.concatenate(list(pixels.values()), axis=1))
    assert assistant.parts == ["3 4", "5 6"]
    # The rest of a chunk that is not executed is not written.
    assert read_chat(agent, rollout, 6)[2].parts == ["7 8", "…"]


def test_bad_settings(tmp_path, learnt):
    with pytest.raises(ValueError, match="which policy"):
        rollout_strip.rollout_strip(StripConfig(out=tmp_path / "strip.png"))
    config = StripConfig(out=tmp_path / "strip.png", frames=1)
    config.policy = lerobot_vla0.Agent.from_pretrained(learnt[0], device="cpu").policy.config
    with pytest.raises(ValueError, match="frames=1 must be at least 2"):
        rollout_strip.rollout_strip(config)


@pytest.mark.slow
def test_command(learnt, process_env, tmp_path):
    config = lerobot_vla0.options.load_policy_config(learnt[0])
    settings = describe_policy(config) | {"stand_in_assets": True}
    row = {"suite": "libero_object", "task_id": 2, "task": "fly", "episode": 0, "init_state": 0}
    save_episode(tmp_path / "eval", "1/1", settings, row | {"success": True, "steps": 9})
    (tmp_path / "log").write_text("step:50 smpl:4K ep:40 loss:2.5 grdn:0.563\nstep:100 smpl:8K loss:1.5\n")
    arguments = [f"--policy.path={learnt[0]}", "--policy.device=cpu", f"--out={tmp_path}/new/strip.png"]
    arguments += [f"--log={tmp_path}/log", f"--reports={tmp_path}/eval"]
    log = run_script("lerobot-vla0", "strip", *arguments, env=process_env).stdout
    assert "Failure after 280 steps" in log and f"Wrote {tmp_path}/new/strip.png" in log
    assert (tmp_path / "new/strip.png").stat().st_size <= MAX_BYTES
