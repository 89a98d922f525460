"""Acting with the VLM behind an HTTP server: a real one, and stand-ins that misbehave."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from conftest import make_config, observation, run_script
from lerobot.configs import PreTrainedConfig
from torchvision.io import decode_png

from lerobot_vla0.cli import main
from lerobot_vla0.decoding import server as server_module
from lerobot_vla0.modeling_vla0 import VLA0Policy


class FakeServer(BaseHTTPRequestHandler):
    """Answers as `self.server.behaviour` says: a text to write, or "hang", "die", "busy", "html", ..."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.peers.add(self.client_address)
        behaviour = self.server.behaviour
        if isinstance(behaviour, list):
            behaviour = behaviour.pop(0)
        if behaviour == "hang":
            self.server.released.wait(20)
        elif behaviour == "die":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "12 ')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif behaviour == "busy":
            self.reply(503, {"error": "loading"})
        elif behaviour == "strict" and "regex" in request:
            self.reply(422, {"detail": "Unexpected fields in the request: {'regex'}"})
        elif behaviour == "unknown model":
            self.reply(404, {"error": "the model does not exist"})
        elif behaviour == "html":
            self.reply(200, "<html>welcome</html>")
        elif behaviour == "no chat":
            self.reply(200, {"object": "list"})
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


@pytest.fixture
def fake():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    server.daemon_threads = True
    server.requests, server.peers, server.models, server.behaviour = [], set(), ["tiny"], "7 " * 13 + "1000"
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def fast_backoff(monkeypatch):
    monkeypatch.setattr(server_module, "BACKOFF_S", 0.01)


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
    assert not re.fullmatch(regex, "7 " * 13 + "1001") and not re.fullmatch(regex, "7 " * 12 + "7")


def test_one_connection_pool(learnt, fake):
    policy, batch = remote(learnt, fake.url)
    for _ in range(5):
        policy.predict_action_chunk(batch)
    assert len(fake.requests) == 10 and len(fake.peers) <= 2


def test_select_action_queues_and_ensembles(learnt, fake):
    policy, batch = remote(learnt, fake.url)
    actions = [policy.select_action(batch) for _ in range(2)]
    assert len(fake.requests) == 2 and actions[1][0].tolist() == [7.0] * 6 + [1000.0]
    averaging, batch = remote(learnt, fake.url, n_action_steps=1, ensemble_size=2)
    first, second = averaging.select_action(batch), averaging.select_action(batch)
    # 7 of the newest chunk, and half the weight of the older chunk's 1000.
    assert first[0, 6] == 7 and second[0, 6] == pytest.approx((7 + 0.5 * 1000) / 1.5)


@pytest.mark.parametrize("trouble", ["die", "busy", "hang"])
def test_is_asked_again(learnt, fake, trouble):
    fake.behaviour = [trouble, trouble, "5 " * 13 + "5"]
    policy, batch = remote(learnt, fake.url, server_timeout=0.5)
    chunk = policy.predict_action_chunk({k: v[:1] for k, v in batch.items()})
    assert len(fake.requests) == 3 and (chunk == 5).all()


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("hang", ConnectionError, "no answer in 3 attempts of at most 0.3 s .ReadTimeout"),
        ("die", ConnectionError, "no answer in 3 attempts .*RemoteProtocolError"),
        ("busy", ConnectionError, "no answer in 3 attempts .*status 503.*loading"),
        ("unknown model", ConnectionError, "refused the request with status 404.*does not exist"),
        ("html", ValueError, "answered no JSON: '<html>"),
        ("no chat", ValueError, "no chat completion, but"),
        ("I am a language model", ValueError, "'tiny' wrote no actions: expected 14 integers, got 5"),
        ("7 " * 13 + "1001", ValueError, "wrote no actions: expected integers in 0..1000, got '1001'"),
        ("7 " * 13 + "-1", ValueError, "wrote no actions.*'-1'"),
        ("", ValueError, "expected 14 integers, got 0"),
    ],
)
def test_what_goes_wrong_is_said(learnt, fake, behaviour, error, message):
    fake.behaviour = behaviour
    policy, batch = remote(learnt, fake.url, server_timeout=0.3)
    with pytest.raises(error, match=message) as caught:
        policy.predict_action_chunk({k: v[:1] for k, v in batch.items()})
    assert fake.url in str(caught.value)


def test_nobody_there(learnt):
    policy, batch = remote(learnt, "http://127.0.0.1:9/v1", server_model="tiny")
    with pytest.raises(ConnectionError, match="ConnectError.*Is it running"):
        policy.predict_action_chunk(batch)


def test_server_without_structured_output(learnt, fake, caplog):
    fake.behaviour = "strict"
    policy, batch = remote(learnt, fake.url)
    one = {k: v[:1] for k, v in batch.items()}
    for _ in range(3):
        assert (policy.predict_action_chunk(one) == 1).all()
    assert ["regex" in r for r in fake.requests] == [True, False, False, False]
    assert sum("takes no structured output" in r.getMessage() for r in caplog.records) == 1


def test_model_name(learnt, fake):
    fake.models = ["a", "b"]
    policy, batch = remote(learnt, fake.url)
    with pytest.raises(ValueError, match=r"names the models \['a', 'b'\], not one.*server_model"):
        policy.predict_action_chunk(batch)
    policy, batch = remote(learnt, fake.url, server_model="b")
    policy.predict_action_chunk(batch)
    assert fake.requests[0]["model"] == "b"


def test_api_key(learnt, fake, monkeypatch):
    monkeypatch.setenv("VLA0_SERVER_API_KEY", "secret")
    policy, _ = remote(learnt, fake.url)
    assert policy.decoder.client.headers["Authorization"] == "Bearer secret"


def test_needs_no_weights(learnt, fake, tmp_path):
    folder, batch = learnt
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "model.safetensors":
            copy = tmp_path / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    policy, batch = remote((tmp_path, batch), fake.url)
    assert policy.predict_action_chunk(batch).shape == (2, 2, 7)


def test_cannot_train_or_be_saved(learnt, fake, tmp_path, tiny_vlm):
    policy, _ = remote(learnt, fake.url)
    for act in (lambda: policy.forward(learnt[1]), lambda: policy.save_pretrained(tmp_path / "x")):
        with pytest.raises(ValueError, match="can act but not train or be saved"):
            act()
    with pytest.raises(ValueError, match="is for acting with a trained checkpoint"):
        VLA0Policy(make_config(tiny_vlm, server=fake.url))
    with pytest.raises(ValueError, match="server='localhost:8000' is not allowed.*http://"):
        make_config(tiny_vlm, server="localhost:8000")


@pytest.mark.slow
def test_lerobot_eval_with_a_server(learnt, fake, tmp_path, process_env):
    """LeRobot's script, two environments at once: a request each for every two steps."""
    run_script(
        "lerobot-eval", f"--policy.path={learnt[0]}", f"--policy.server={fake.url}", "--policy.device=cpu",
        "--env.type=vla0_libero", "--env.task=libero_object", "--env.task_ids=[7]", "--env.assets=primitive",
        "--env.episode_length=6", "--eval.batch_size=2", "--eval.n_episodes=2", f"--output_dir={tmp_path}",
        env=process_env,
    )  # fmt: skip
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["n_episodes"] == 2
    assert len(fake.requests) == 2 * 3


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
