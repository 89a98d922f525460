"""LeRobot's asynchronous inference as processes: our server, LeRobot's client, a robot without hardware."""

import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import make_act


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


@pytest.fixture
def serve(tmp_path, robot_env):
    """Runs server and client; gives the client's process, both logs and the file of the robot's actions."""

    @contextmanager
    def run(checkpoint, *client_arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [tmp_path / name for name in ("server.log", "client.log", "robot.jsonl")]
        arguments = ["--host=127.0.0.1", f"--port={port}", "--fps=5"]
        with process("lerobot_vla0.async_server", *arguments, env=robot_env, log=logs[0]) as server:
            wait_for(lambda: "started on" in logs[0].read_text(), server, logs[0])
            arguments = [
                f"--server_address=127.0.0.1:{port}",
                "--robot.type=mock_arm",
                f"--robot.log={logs[2]}",
                "--policy_type=vla0",
                f"--pretrained_name_or_path={checkpoint}",
                "--policy_device=cpu",
                "--actions_per_chunk=16",
                "--task=put the cube into the box",
                "--fps=5",
                *client_arguments,
            ]
            with process(
                "lerobot.async_inference.robot_client", *arguments, env=robot_env, log=logs[1]
            ) as client:
                yield client, logs

    return run


@pytest.mark.slow
def test_a_client_acts(serve, robot_checkpoint):
    with serve(robot_checkpoint) as (client, (_, log, robot)):
        wait_for(lambda: robot.exists() and len(robot.read_text().splitlines()) >= 20, client, log)
        rows = [json.loads(line) for line in robot.read_text().splitlines()]
    assert all(len(row) == 7 and all(abs(joint) <= 90 for joint in row[1:]) for row in rows)
    assert len({tuple(row[1:]) for row in rows}) > 5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cameras", "type"])
def test_a_client_is_told_why_it_is_refused(case, serve, robot_checkpoint, tmp_path):
    checkpoint, arguments, named = robot_checkpoint, ["--robot.keys=[front,top]"], "observation.images.top"
    if case == "type":
        checkpoint, arguments, named = tmp_path / "act", [], "act"
        make_act(checkpoint)
    with serve(checkpoint, *arguments) as (client, (_, log, _robot)):
        wait_for(lambda: "Failed to connect" in log.read_text() or client.poll() is not None, client, log)
    assert named in log.read_text().split("Failed to connect")[1]
