"""LeRobot's asynchronous inference as processes: our server, LeRobot's client, a robot without hardware."""

import json
import logging
import pickle
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_act, make_robot_checkpoint
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.feature_utils import hw_to_dataset_features
from lerobot_robot_mock import CAMERAS, JOINTS

from lerobot_vla0.modeling_vla0 import VLA0Policy

NAMES = [f"{joint}.pos" for joint in JOINTS]


@contextmanager
def process(module: str, *arguments: str, env: dict[str, str], log):
    with log.open("w") as out:
        command = [sys.executable, "-m", module, *arguments]
        running = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield running
    finally:
        running.terminate()
        running.wait(30)


def wait_for(condition, running, log, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.mark.slow
def test_a_client_acts(robot_checkpoint, robot_env, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served, log, robot = (tmp_path / name for name in ("server.log", "client.log", "robot.jsonl"))
    server_arguments = ["--host=127.0.0.1", f"--port={port}", "--fps=5"]
    client_arguments = [
        f"--server_address=127.0.0.1:{port}", "--robot.type=mock_arm", f"--robot.log={robot}", "--fps=5",
        "--policy_type=vla0", f"--pretrained_name_or_path={robot_checkpoint}", "--policy_device=cpu",
        "--actions_per_chunk=16", "--task=put the cube into the box", "--aggregate_fn_name=latest_only",
    ]  # fmt: skip
    with process("lerobot_vla0.async_server", *server_arguments, env=robot_env, log=served) as server:
        wait_for(lambda: "started on" in served.read_text(), server, served)
        client_module = "lerobot.async_inference.robot_client"
        with process(client_module, *client_arguments, env=robot_env, log=log) as client:
            wait_for(lambda: robot.exists() and len(robot.read_text().splitlines()) >= 20, client, log)
    rows = np.array([json.loads(line) for line in robot.read_text().splitlines()])[:, 1:]
    assert rows.shape[1] == 6 and np.abs(rows).max() <= 90 and len(np.unique(rows, axis=0)) > 5


# without processes


@pytest.fixture(scope="module")
def relative_checkpoint(tiny_vlm, tmp_path_factory):
    out = tmp_path_factory.mktemp("relative") / "checkpoint"
    return make_robot_checkpoint(tiny_vlm, out, 2.0, use_relative_actions=True, action_feature_names=NAMES)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server, without a network."""
    monkeypatch.chdir(tmp_path)  # LeRobot makes a folder of logs when it is imported
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from lerobot.async_inference.configs import PolicyServerConfig

    from lerobot_vla0.async_server import CheckingServer, policy_server

    root.handlers[:], root.level = handlers, level  # which it replaces
    monkeypatch.setattr(policy_server, "SUPPORTED_POLICIES", [*policy_server.SUPPORTED_POLICIES, "vla0"])
    return CheckingServer(PolicyServerConfig(host="127.0.0.1"))


def connect(server, checkpoint, keys=("front", "wrist"), joints=6, kind="vla0", actions=16):
    """As a robot with these cameras connects."""
    from lerobot.async_inference.helpers import RemotePolicyConfig

    hardware = {**dict.fromkeys(NAMES[:joints], float), **{key: CAMERAS[key] for key in keys}}
    features = hw_to_dataset_features(hardware, "observation", use_video=False)
    wanted = RemotePolicyConfig(kind, str(checkpoint), features, actions)
    request, context = SimpleNamespace(data=pickle.dumps(wanted)), SimpleNamespace(peer=lambda: "a robot")
    server.SendPolicyInstructions(request, context)


def robot_observation(seed: int, keys=("front", "wrist")) -> dict:
    random = np.random.default_rng(seed)
    images = {key: random.integers(0, 256, CAMERAS[key], dtype=np.uint8) for key in keys}
    joints = dict(zip(NAMES, random.uniform(-50, 50, 6).tolist(), strict=True))
    return {**joints, **images, "task": "put the cube into the box"}


def predict(server, seed: int, **options) -> torch.Tensor:
    """The commands (16, 6) that the server sends back."""
    from lerobot.async_inference.helpers import TimedObservation

    answer = server._predict_action_chunk(TimedObservation(0.0, 0, robot_observation(seed, **options)))
    return torch.stack([timed.get_action() for timed in answer])


def test_the_server_answers_what_the_policy_decodes(server, relative_checkpoint):
    connect(server, relative_checkpoint)
    policy = VLA0Policy.from_pretrained(relative_checkpoint)
    preprocess, postprocess = make_pre_post_processors(policy.config, str(relative_checkpoint))
    answers = []
    for seed in range(2):
        raw = robot_observation(seed)
        images = {
            f"observation.images.{key}": torch.tensor(raw[key]).permute(2, 0, 1)[None].float() / 255
            for key in ("front", "wrist")
        }
        state = torch.tensor([[raw[name] for name in NAMES]])
        batch = preprocess({**images, "observation.state": state, "task": raw["task"]})
        expected = postprocess(policy.predict_action_chunk(batch))[0]
        answers.append(predict(server, seed))
        torch.testing.assert_close(answers[-1], expected, rtol=0, atol=1e-4)
        assert (expected[:, :5] - state[0, :5]).abs().max() <= 2 + 1e-4 < state.abs().max()
    assert not torch.equal(*answers)


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        ({"keys": ["front", "top"]}, r"cameras \['observation.images.front', 'observation.images.top'\]"),
        ({"joints": 5}, "the robot has 5 joints .* actions of 6 dimensions"),
    ],
)
def test_a_robot_that_does_not_fit_is_refused_when_it_connects(robot, message, server, robot_checkpoint):
    with pytest.raises(ValueError, match=message):
        connect(server, robot_checkpoint, **robot)


def test_a_camera_may_be_missing_if_the_checkpoint_says_so(server, tiny_vlm, tmp_path):
    checkpoint = make_robot_checkpoint(tiny_vlm, tmp_path / "checkpoint", empty_cameras=1)
    connect(server, checkpoint, keys=["wrist"])
    assert predict(server, 0, keys=["wrist"]).shape == (16, 6)
    with pytest.raises(ValueError, match="has the cameras"):
        connect(server, checkpoint, keys=[])


def test_a_checkpoint_of_another_type_is_refused(server, tmp_path):
    make_act(tmp_path / "act")
    with pytest.raises(ValueError, match="holds a policy of type 'act', not vla0"):
        connect(server, tmp_path / "act")
