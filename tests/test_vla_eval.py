"""A third party's evaluator drives our checkpoints: vla-eval (https://pypi.org/project/vla-eval) with its own
LeRobot bridge, which calls `predict_action_chunk` and the saved processors, and its own LIBERO loop."""

import numpy as np
import pytest
import torch
from conftest import make_config, make_stats


@pytest.fixture(scope="module")
def checkpoint(tiny_vlm, tmp_path_factory):
    from lerobot_vla0.modeling_vla0 import VLA0Policy
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    folder = tmp_path_factory.mktemp("policy")
    config = make_config(tiny_vlm, size=256, n_action_steps=4)
    VLA0Policy(config).save_pretrained(folder)
    for processor in make_vla0_pre_post_processors(config, make_stats()):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture
def server(checkpoint):
    from vla_eval.model_servers.lerobot import LeRobotModelServer

    cameras = {"agentview": "image", "wrist": "image2"}
    return LeRobotModelServer("vla0", str(checkpoint), image_keys=cameras, device="cpu")


def test_its_bridge_gives_what_our_agent_gives(server, checkpoint):
    import lerobot_vla0

    generator = np.random.default_rng(0)
    images = {name: generator.integers(0, 256, (256, 256, 3), np.uint8) for name in ("agentview", "wrist")}
    state, task = np.zeros(8, dtype=np.float32), "pick up the milk and place it in the basket"
    chunk = server.predict({"images": images, "states": state, "task_description": task}, None)["actions"]
    assert chunk.shape == (8, 7) and server.chunk_size == 4  # it executes n_action_steps of them
    agent = lerobot_vla0.Agent.from_pretrained(checkpoint)
    pixels = {"image": images["agentview"], "image2": images["wrist"]}
    for expected in chunk[:4]:
        assert np.array_equal(agent.act({"pixels": pixels, "agent_pos": state}, task), expected)


@pytest.mark.slow
def test_its_libero_loop_runs_our_checkpoint(server, throw_away, monkeypatch, tmp_path):
    """Its benchmark, its server, its websocket between them; on the stand-in assets."""
    from vla_eval.api import evaluate

    from lerobot_vla0.libero.assets import prepare_libero

    monkeypatch.setattr(torch, "load", torch.load)  # vla-eval replaces it; pytest puts it back
    prepare_libero("libero_object", "primitive")
    benchmark = {
        "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
        "episodes_per_task": 1,
        "max_tasks": 1,
        "params": {"suite": "libero_object", "max_steps": 6},
    }
    results = evaluate(server, {"benchmarks": [benchmark]}, docker=False, no_save=True, output_dir=tmp_path)
    (task,) = results[0]["tasks"]
    (episode,) = task["episodes"]
    assert task["task"] == "pick up the alphabet soup and place it in the basket"
    assert episode["steps"] == 6 and episode.get("failure_reason") is None
