"""Acting with the VLM behind an HTTP server: a real one, and stand-ins that misbehave."""

import asyncio
import gzip
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from conftest import observation
from lerobot.configs import PreTrainedConfig
from torchvision.io import decode_png

from lerobot_vla0.agent import Agent
from lerobot_vla0.cli import main
from lerobot_vla0.decoding import server as server_module
from lerobot_vla0.modeling_vla0 import VLA0Policy


class FakeServer(BaseHTTPRequestHandler):
    """Answers as `self.server.behaviour` says: a text to write, a status, a function, or "hang", "die"."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        behaviour = self.server.behaviour
        if isinstance(behaviour, list):
            behaviour = behaviour.pop(0)
        if callable(behaviour):
            try:
                behaviour(self)
            except OSError:  # the client has gone
                self.server.left.set()
            self.close_connection = True
        elif behaviour == "hang":
            self.server.released.wait(20)
        elif behaviour == "die":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "12 ')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(behaviour, int):
            self.reply(behaviour, {"error": "no model"})
        elif behaviour == "strict" and "regex" in request:
            self.reply(422, {"detail": "Unexpected fields in the request: {'regex'}"})
        else:
            text = "1 " * 13 + "1" if behaviour == "strict" else behaviour
            self.reply(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def reply(self, status, content):
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(port: int = 0):
    server = ThreadingHTTPServer(("127.0.0.1", port), FakeServer)
    server.daemon_threads = True
    server.requests, server.models, server.behaviour = [], ["tiny"], "7 " * 13 + "1000"
    server.released, server.left = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def fake():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(server_module, "RETRY_S", 0.01)
    monkeypatch.setattr(server_module, "STARTUP_S", 0.0)


def remote(learnt, url, **overrides):
    """As LeRobot's scripts load `--policy.path=... --policy.server=...`."""
    folder, batch = learnt
    config = PreTrainedConfig.from_pretrained(
        folder, cli_overrides=[f"--server={url}", *(f"--{k}={v}" for k, v in overrides.items())]
    )
    return VLA0Policy.from_pretrained(folder, config=config), observation(batch)


def test_asks_and_reads(learnt, fake):
    policy, batch = remote(learnt, fake.url)
    assert sum(p.numel() for p in policy.parameters()) == 0
    chunk = policy.predict_action_chunk(batch)
    assert chunk.dtype == torch.float32
    assert chunk.tolist() == [[[7.0] * 7, [7.0] * 6 + [1000.0]]] * 2
    requests = {r["messages"][1]["content"][1]["text"]: r for r in fake.requests}
    assert set(requests) == set(batch["task"])
    request = requests[batch["task"][0]]
    assert request["model"] == "tiny" and request["temperature"] == 0 and request["max_tokens"] == 70
    assert request["messages"][0] == {"role": "system", "content": policy.examples.chat.system_prompt}
    picture = request["messages"][1]["content"][0]["image_url"]["url"]
    assert picture.startswith("data:image/png;base64,")

    png = torch.frombuffer(bytearray(b64decode(picture.partition(",")[2])), dtype=torch.uint8)
    assert torch.equal(decode_png(png), policy.examples.pictures(policy.examples.check(batch), None)[0, 0])
    regex = request["structured_outputs"]["regex"]
    assert request["regex"] == regex and re.fullmatch(regex, "7 " * 13 + "1000")
    # Whatever the served generation_config.json asks for.
    neutral = {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    assert {name: request[name] for name in neutral} == neutral
    assert not re.fullmatch(regex, "7 " * 13 + "1001") and not re.fullmatch(regex, "7 " * 12 + "7")


@pytest.mark.parametrize("trouble", ["die", 503, "hang"])
def test_asks_again(learnt, fake, trouble, monkeypatch):
    monkeypatch.setattr(server_module, "TIMEOUT_S", 0.5)
    fake.behaviour = [trouble, trouble, "5 " * 13 + "5"]
    policy, batch = remote(learnt, fake.url)
    chunk = policy.predict_action_chunk({k: v[:1] for k, v in batch.items()})
    assert len(fake.requests) == 3 and (chunk == 5).all()


def write(*parts: bytes, pause: float = 0.0):
    """Sends bytes as they are, waiting between the parts."""

    def behave(handler):
        for part in parts:
            handler.wfile.write(part)
            handler.wfile.flush()
            if pause and handler.server.released.wait(pause):
                return

    return behave


def respond(body: bytes, status: str = "200 OK", **headers: str):
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return write("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_ANSWER = (ConnectionError, "gave no answer in 3 attempts of at most 0.5 s")
NO_CHUNK = (ValueError, "is no chunk of actions")


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("hang", *NO_ANSWER),
        ("die", *NO_ANSWER),
        (write(CHUNKED, *[b"1\r\n \r\n"] * 999, pause=0.1), *NO_ANSWER),
        (503, ConnectionError, "no answer in 3 attempts .*status 503.*no model"),
        (write(CHUNKED, *[b"100000\r\n" + b" " * 2**20 + b"\r\n"] * 400), ValueError, "larger than 1048576"),
        (respond(gzip.compress(bytes(2**26), 1), Content_Encoding="gzip"), *NO_CHUNK),
        (404, ConnectionError, "status 404: .*no model.*--policy.server_model=tiny"),
        (respond(b"<html>welcome</html>"), *NO_CHUNK),
        (respond(b"[" * 10**6), *NO_CHUNK),
        (respond(b'{"choices": [null]}'), *NO_CHUNK),
        (respond(b'{"choices": [{"message": {"content": null}}]}'), *NO_CHUNK),
        ("I am a language model", ValueError, "no chunk of actions .expected 14 integers, got 5"),
        ("7 " * 13 + "1001", ValueError, "expected integers in 0..1000, got '1001'"),
    ],
)
def test_misbehaviour_is_an_error_that_names_the_server(learnt, fake, behaviour, error, message, monkeypatch):
    monkeypatch.setattr(server_module, "TIMEOUT_S", 0.5)
    fake.behaviour = behaviour
    policy, batch = remote(learnt, fake.url)
    one = {k: v[:1] for k, v in batch.items()}
    with pytest.raises(error, match=message) as caught:
        policy.predict_action_chunk(one)
    assert str(caught.value).isprintable() and fake.url in str(caught.value)
    fake.behaviour = "7 " * 13 + "7"  # it has no effect on later chunks
    assert (policy.predict_action_chunk(one) == 7).all()


def test_a_key_with_a_line_break_is_not_shown(learnt, monkeypatch):
    monkeypatch.setenv("VLA0_SERVER_API_KEY", "a\nb")
    with pytest.raises(ValueError, match="VLA0_SERVER_API_KEY has line breaks") as caught:
        remote(learnt, "http://127.0.0.1:9/v1")
    assert "a\nb" not in str(caught.value)


def test_a_redirect_gets_neither_key_nor_pictures(learnt, fake, monkeypatch):
    monkeypatch.setenv("VLA0_SERVER_API_KEY", "secret")
    with serving() as other:
        fake.behaviour = respond(b"", "307 There", Location=f"{other.url}/chat/completions")
        policy, batch = remote(learnt, fake.url, server_model="tiny")
        with pytest.raises(ConnectionError, match="status 307: .*Redirects are not followed"):
            policy.predict_action_chunk(batch)
        assert fake.requests and not other.requests


def test_a_checkpoint_cannot_name_a_server(learnt, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("VLA0_SERVER_API_KEY", "secret")
    folder = tmp_path / "checkpoint"
    shutil.copytree(learnt[0], folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"server": fake.url}))
    for load in (
        lambda: VLA0Policy.from_pretrained(folder),
        lambda: Agent.from_pretrained(folder, device="cpu"),
        lambda: remote((folder, learnt[1]), fake.url),  # the same one: the two cannot be told apart
    ):
        with pytest.raises(ValueError, match="config.json names server='http.*cannot choose one"):
            load()
    with serving() as own:  # the caller's counts, or none
        policy, batch = remote((folder, learnt[1]), own.url)
        policy.predict_action_chunk(batch)
        assert own.requests and not fake.requests
    local, _ = remote((folder, learnt[1]), "null")
    assert local.config.server is None and not fake.requests


def test_an_interrupt_ends_at_once(learnt, fake, monkeypatch):
    """While two rows wait for a server that hangs, whose connections are closed."""
    fake.behaviour = write(*[b" "] * 3000, pause=0.02)
    monkeypatch.setattr(server_module, "TIMEOUT_S", 1000.0)
    policy, batch = remote(learnt, fake.url, server_model="tiny")
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it

    def interrupt():
        while len(fake.requests) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            policy.predict_action_chunk(batch)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert fake.left.wait(20)
    fake.behaviour = "7 " * 13 + "7"
    assert (policy.predict_action_chunk(batch) == 7).all()


def test_acts_in_threads_and_where_a_loop_runs(learnt, fake):
    """As in LeRobot's rollout, and in a notebook."""
    policy, batch = remote(learnt, fake.url)

    async def cell():
        return policy.predict_action_chunk(batch)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(policy.predict_action_chunk, [batch] * 8))
    assert all(torch.equal(result, asyncio.run(cell())) for result in results[:2])


def test_waits_for_a_server_that_is_starting(learnt, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "STARTUP_S", 1000.0)
    with serving() as server:
        port = server.server_address[1]
    policy, batch = remote(learnt, f"http://localhost:{port}/v1", server_model="tiny")
    with ThreadPoolExecutor() as pool, caplog.at_level(logging.WARNING):
        acting = pool.submit(policy.predict_action_chunk, batch)
        while not caplog.records:
            assert not acting.done(), acting.result()
            time.sleep(0.01)
        with serving(port):
            assert acting.result().shape == (2, 2, 7)
    assert sum("refuses connections. Is it starting?" in r.getMessage() for r in caplog.records) == 1


def test_server_without_structured_output(learnt, fake, caplog):
    fake.behaviour = "strict"
    policy, batch = remote(learnt, fake.url)
    one = {k: v[:1] for k, v in batch.items()}
    for _ in range(3):
        assert (policy.predict_action_chunk(one) == 1).all()
    for name in ("regex", "structured_outputs", "repetition_penalty", "top_p", "top_k", "min_p"):
        assert [name in r for r in fake.requests] == [True, False, False, False]
    assert sum("takes no structured output" in r.getMessage() for r in caplog.records) == 1


def test_real_time_chunking(learnt, fake):
    """The grammar that is sent begins with what is committed; an answer that does not is an error."""
    policy, batch = remote(learnt, fake.url)
    left = torch.tensor([[[3.0] * 7, [8.0] * 7]])
    one = {k: v[:1] for k, v in batch.items()}
    fake.behaviour = "3 " * 7 + "9 " * 6 + "9"
    chunk = policy.predict_action_chunk(one, inference_delay=1, prev_chunk_left_over=left)
    assert chunk.tolist() == [[[3.0] * 7, [9.0] * 7]]
    regex = fake.requests[-1]["structured_outputs"]["regex"]
    assert re.fullmatch(regex, fake.behaviour) and not re.fullmatch(regex, "4 " + fake.behaviour[2:])
    with pytest.raises(ValueError, match="does not begin with the actions that the robot is executing"):
        policy.predict_action_chunk(one, inference_delay=2, prev_chunk_left_over=left)


def test_model_name(learnt, fake):
    fake.models = ["a", "b"]
    policy, batch = remote(learnt, fake.url)
    with pytest.raises(ValueError, match=r"names the models \['a', 'b'\], not one.*server_model"):
        policy.predict_action_chunk(batch)
    policy, batch = remote(learnt, fake.url, server_model="b")
    policy.predict_action_chunk(batch)
    assert fake.requests[0]["model"] == "b"


def test_cannot_train_or_be_saved(learnt, fake, tmp_path):
    copy = shutil.copytree(learnt[0], tmp_path / "x", ignore=shutil.ignore_patterns("model.safetensors"))
    policy, _ = remote((copy, learnt[1]), fake.url)  # acts without weights
    for use in (lambda: policy.forward(learnt[1]), lambda: policy.save_pretrained(tmp_path / "y")):
        with pytest.raises(ValueError, match="the weights are on the server"):
            use()


@pytest.mark.slow
def test_transformers_serve_gives_the_local_actions(learnt, tmp_path, process_env):
    """The real thing: export, `transformers serve`, the same actions as local greedy decoding."""
    pytest.importorskip("fastapi")
    out = tmp_path / "exported"
    main(["export", f"--policy.path={learnt[0]}", f"--out={out}"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(out),
        "--host=127.0.0.1", f"--port={port}", "--device=cpu",
    ]  # fmt: skip
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command, env=process_env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            if process.poll() is not None:
                pytest.fail((tmp_path / "serve.log").read_text()[-3000:])
            try:
                httpx.get(url + "/health", timeout=2)
                break
            except httpx.TransportError:
                time.sleep(0.5)
        policy, batch = remote(learnt, url + "/v1", server_model=str(out))
        served = policy.predict_action_chunk(batch)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
    local = VLA0Policy.from_pretrained(learnt[0])
    assert torch.equal(served, local.predict_action_chunk(batch))
    assert torch.equal(served, learnt[1]["action"].float())
