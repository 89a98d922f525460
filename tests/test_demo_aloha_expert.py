"""The expert of ALOHA's cube transfer, in gym-aloha without pictures."""

import numpy as np
import pytest

gym_aloha = pytest.importorskip("gym_aloha")


@pytest.mark.slow
def test_transfers_the_cube(monkeypatch):
    import gymnasium
    from gym_aloha.tasks.sim import BimanualViperXTask

    from lerobot_vla0.demo.aloha_expert import TransferExpert

    def without_pictures(self, physics):
        picture = np.zeros((480, 640, 3), np.uint8)
        return {"qpos": self.get_qpos(physics), "images": {"top": picture}}

    monkeypatch.setattr(BimanualViperXTask, "get_observation", without_pictures)
    env = gymnasium.make("gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos", max_episode_steps=400)
    for seed in (0, 7):
        env.reset(seed=seed)
        expert = TransferExpert(env.unwrapped)
        ended = any(env.step(expert.act().astype(np.float32))[2] for _ in range(160))
        assert ended, seed
