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
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from conftest import eval_with_a_server, make_config, observation
from lerobot.configs import PreTrainedConfig
from torchvision.io import decode_png

from lerobot_vla0.agent import Agent
from lerobot_vla0.cli import main
from lerobot_vla0.decoding import server as server_module
from lerobot_vla0.decoding.server import ServerDecoder
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


@contextmanager
def serving(port: int = 0):
    server = ThreadingHTTPServer(("127.0.0.1", port), FakeServer)
    server.daemon_threads = True
    server.requests, server.peers, server.models, server.behaviour = [], set(), ["tiny"], "7 " * 13 + "1000"
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
def fast_backoff(monkeypatch):
    monkeypatch.setattr(server_module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(server_module, "STARTUP_S", 0.0)
    monkeypatch.setattr(server_module, "STARTUP_RETRY_S", 0.01)


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
        ("hang", ConnectionError, "no answer in 3 attempts of at most 0.3 s .TimeoutError"),
        ("die", ConnectionError, "no answer in 3 attempts .*RemoteProtocolError"),
        ("busy", ConnectionError, "no answer in 3 attempts .*status 503.*loading"),
        (
            "unknown model",
            ConnectionError,
            "refused the request with status 404.*does not exist.*--policy.server_model=tiny.*end in /v1",
        ),
        ("html", ValueError, "answered no JSON, but '<html>"),
        ("no chat", ValueError, "no chat completion, but"),
        ("I am a language model", ValueError, "'tiny' wrote no actions: expected 14 integers, got 5"),
        ("7 " * 13 + "1001", ValueError, "wrote no actions: expected integers in 0..1000, got '1001'"),
        ("7 " * 13 + "-1", ValueError, "wrote no actions.*'-1'.*may ignore structured output"),
        ("", ValueError, "expected 14 integers, got 0"),
    ],
)
def test_what_goes_wrong_is_said(learnt, fake, behaviour, error, message):
    fake.behaviour = behaviour
    policy, batch = remote(learnt, fake.url, server_timeout=0.3)
    with pytest.raises(error, match=message) as caught:
        policy.predict_action_chunk({k: v[:1] for k, v in batch.items()})
    assert fake.url in str(caught.value)


# ----------------------------------------------------------------------------------- servers that misbehave


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
    length = [] if "Transfer_Encoding" in headers else [f"Content-Length: {len(body)}"]
    return write("\r\n".join([*lines, *length, "", ""]).encode() + body)


def answer(content) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


GOOD = answer("7 " * 13 + "7")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MEGABYTE = b" " * 2**20
NO_ANSWER = (ConnectionError, "gave no answer in 1 attempts")
REDIRECTED = (ConnectionError, "redirects to ")
REFUSED = (ConnectionError, "refused the request with status ")
TOO_LARGE = (ValueError, "its answer is larger than 1048576 bytes")
COMPRESSED = (ValueError, "compressed its answer .'.*'., unasked")
NO_JSON = (ValueError, "answered no JSON, but ")
NO_CHAT = (ValueError, "no chat completion, but ")
NO_ACTIONS = (ValueError, "wrote no actions")

# What a server may do → the error. Those that drip would take minutes.
MISBEHAVIOURS = {
    "drips the body": (write(HEAD % 999, *[b" "] * 999, pause=0.1), NO_ANSWER),
    "drips the headers": (
        write(*(b"HTTP/1.1 200 OK\r\n"[i % 17 :][:1] for i in range(999)), pause=0.1),
        NO_ANSWER,
    ),
    "drips header after header": (write(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 999, pause=0.1), NO_ANSWER),
    "drips chunks": (write(CHUNKED, *[b"1\r\n \r\n"] * 999, pause=0.1), NO_ANSWER),
    "continues for ever": (write(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 999, pause=0.1), NO_ANSWER),
    "hangs up": (write(), NO_ANSWER),
    "hangs up in the body": (write(HEAD % 1000, GOOD), NO_ANSWER),
    "hangs up in a chunk": (write(CHUNKED, b"ff\r\n{"), NO_ANSWER),
    "no HTTP": (write(b"SSH-2.0-OpenSSH_9.6\r\n"), NO_ANSWER),
    "no status": (write(b"HTTP/1.1 OK\r\n\r\n"), NO_ANSWER),
    "zeros": (write(bytes(1000)), NO_ANSWER),
    "no length": (write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + GOOD), NO_ANSWER),
    "two lengths": (respond(GOOD, Content_Length="1"), NO_ANSWER),
    "bad chunk": (write(CHUNKED, b"zz\r\n" + GOOD), NO_ANSWER),
    "endless header": (write(b"HTTP/1.1 200 OK\r\nX: ", *[MEGABYTE] * 4), NO_ANSWER),
    "500": (respond(b"broken", "500 No"), NO_ANSWER),
    "503": (respond(b"", "503 Later"), NO_ANSWER),
    "599": (respond(b"\x1b[2J", "599 ?"), (ConnectionError, r"'\\x1b\[2J'")),
    "400 MB": (write(HEAD % (400 * 2**20), *[MEGABYTE] * 400), TOO_LARGE),
    "400 MB in chunks": (write(CHUNKED, *[b"100000\r\n" + MEGABYTE + b"\r\n"] * 400), TOO_LARGE),
    "400 MB without a length": (write(b"HTTP/1.1 200 OK\r\n\r\n", *[MEGABYTE] * 400), TOO_LARGE),
    "400 MB of refusal": (write(b"HTTP/1.1 404 No\r\n\r\n", *[MEGABYTE] * 400), TOO_LARGE),
    "gzip bomb": (respond(gzip.compress(bytes(2**26), 1), Content_Encoding="gzip"), COMPRESSED),
    "gzip": (respond(gzip.compress(GOOD), Content_Encoding="gzip"), COMPRESSED),
    "bad gzip": (respond(b"zip", Content_Encoding="gzip"), COMPRESSED),
    "gzip of gzip": (respond(GOOD, Content_Encoding="gzip, gzip"), COMPRESSED),
    "zstd": (respond(b"", Content_Encoding="zstd"), COMPRESSED),
    "redirect": (respond(b"", "307 There", Location="http://127.0.0.1:9/v1"), REDIRECTED),
    "permanent redirect": (respond(GOOD, "308 There", Location="/v1/"), REDIRECTED),
    "redirect to a file": (respond(b"", "302 There", Location="file:///etc/passwd"), REDIRECTED),
    "redirect to nothing": (respond(b"", "301 There", Location="http://[::1"), NO_ANSWER),
    "redirect without a place": (respond(b"", "301 There"), REFUSED),
    "204": (write(b"HTTP/1.1 204 No\r\n\r\n"), NO_JSON),
    "304": (write(b"HTTP/1.1 304 No\r\n\r\n"), REFUSED),
    "403": (respond(b"no", "403 No"), REFUSED),
    "418": (respond(b"teapot", "418 No"), REFUSED),
    "empty": (respond(b""), NO_JSON),
    "half": (respond(GOOD[:-9]), NO_JSON),
    "no UTF-8": (respond(b'{"choices": "\xff"}'), NO_JSON),
    "UTF-7": (respond(b"+AGE-", Content_Type="application/json; charset=utf-7"), NO_JSON),
    "no charset": (respond(b"hello", Content_Type="text/html; charset=rot13"), NO_JSON),
    "nested": (respond(b"[" * 10**6), NO_JSON),
    "nested objects": (respond(b'{"choices":' * 10**4), NO_JSON),
    "long number": (respond(b"9" * 10**4), NO_JSON),
    "NaN": (respond(b"NaN"), NO_CHAT),
    "number": (respond(b"5"), NO_CHAT),
    "null": (respond(b"null"), NO_CHAT),
    "text": (respond(b'"choices"'), NO_CHAT),
    "list": (respond(b"[5]"), NO_CHAT),
    "no choice": (respond(b'{"choices": []}'), NO_CHAT),
    "number of choices": (respond(b'{"choices": 5}'), NO_CHAT),
    "text of choices": (respond(b'{"choices": "x"}'), NO_CHAT),
    "named choices": (respond(b'{"choices": {"0": 5}}'), NO_CHAT),
    "choice is null": (respond(b'{"choices": [null]}'), NO_CHAT),
    "message is a list": (respond(b'{"choices": [{"message": []}]}'), NO_CHAT),
    "message is text": (respond(b'{"choices": [{"message": "7 7"}]}'), NO_CHAT),
    "error with status 200": (respond(b'{"error": {"message": "full"}}'), NO_CHAT),
    "content is null": (respond(answer(None)), NO_CHAT),
    "content is a number": (respond(answer(7)), NO_CHAT),
    "content is a list": (respond(answer([7] * 14)), NO_CHAT),
    "content in parts": (respond(answer([{"type": "text", "text": "7"}])), NO_CHAT),
    "half a character": (respond(answer("\ud800 " * 14)), NO_ACTIONS),
    "other digits": (respond(answer("\u0667 " * 14)), NO_ACTIONS),
    "fractions": (respond(answer("7.0 " * 14)), NO_ACTIONS),
    "huge integer": (respond(answer("7 " * 13 + "9" * 9999)), NO_ACTIONS),
    "13 integers": (respond(answer("7 " * 13)), NO_ACTIONS),
    "15 integers": (respond(answer("7 " * 15)), NO_ACTIONS),
    "zeros in text": (respond(answer("\0" * 14)), NO_ACTIONS),
}


@pytest.fixture(scope="module")
def misbehaving(learnt):
    """A server and a policy for all of MISBEHAVIOURS."""
    with serving() as server:
        yield server, *remote(learnt, server.url, server_timeout=0.35, server_model="tiny")


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_misbehaviour_is_an_error_that_names_it(name, misbehaving, monkeypatch):
    monkeypatch.setattr(server_module, "ATTEMPTS", 1)
    server, policy, batch = misbehaving
    server.behaviour, (error, message) = MISBEHAVIOURS[name]
    with pytest.raises(error, match=message) as caught:
        policy.predict_action_chunk({k: v[:1] for k, v in batch.items()})
    assert str(caught.value).isprintable() and server.url in str(caught.value)
    server.behaviour = "7 " * 13 + "7"  # nothing stays of it
    assert (policy.predict_action_chunk(batch) == 7).all()


@pytest.mark.parametrize(
    "models",
    [5, "x", None, {}, [], [5], ["tiny"], [{}], [{"id": 5}], [{"id": None}], [[]], [{"id": ["tiny"]}]],
)
def test_list_of_models_of_a_wrong_shape(models, misbehaving, monkeypatch):
    _, policy, batch = misbehaving
    monkeypatch.setattr(FakeServer, "do_GET", lambda self: self.reply(200, {"data": models}))
    monkeypatch.setattr(policy.decoder, "model", None)
    with pytest.raises(ValueError, match="no list of models, but|names the models .*, not one"):
        policy.predict_action_chunk(batch)


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://", "http://:80/v1", "http://h:99999", "http://h:x", "http://h/v1?a=b", "http://xn--/",
     "http://h/v1#a", "http://h\n/v1", "http://[zz]/", "http://h/" + "a" * 70000],
)  # fmt: skip
def test_no_url_of_a_server(url, misbehaving):
    _, policy, _ = misbehaving
    with pytest.raises(ValueError, match="is no URL of a server .*http://localhost:8000/v1"):
        ServerDecoder(replace(policy.config, server=url), policy.examples)


@pytest.mark.parametrize("host", ["a..b", "a" * 70, "no-such-host.invalid", "1.2.3.4.5"])
def test_no_such_host(host, misbehaving, monkeypatch):
    _, policy, batch = misbehaving
    decoder = ServerDecoder(replace(policy.config, server=f"http://{host}/v1"), policy.examples)
    monkeypatch.setattr(policy, "decoder", decoder)
    monkeypatch.setattr(server_module, "STARTUP_S", 1000.0)  # only for a host that refuses
    with pytest.raises(ConnectionError, match="gave no answer in 3 attempts"):
        policy.predict_action_chunk(batch)


@pytest.mark.parametrize("key", ["a\nb", "\r", "schl\u00fcssel", "a\x7f"])
def test_no_key(key, misbehaving, monkeypatch):
    _, policy, _ = misbehaving
    monkeypatch.setenv("VLA0_SERVER_API_KEY", key)
    with pytest.raises(ValueError, match="VLA0_SERVER_API_KEY has line breaks") as caught:
        ServerDecoder(policy.config, policy.examples)
    assert key not in str(caught.value)


def test_a_redirect_gets_neither_key_nor_pictures(learnt, fake, monkeypatch):
    monkeypatch.setenv("VLA0_SERVER_API_KEY", "secret")
    with serving() as other:
        fake.behaviour = respond(b"", "307 There", Location=f"{other.url}/chat/completions")
        policy, batch = remote(learnt, fake.url, server_model="tiny")
        with pytest.raises(ConnectionError, match=f"redirects to '{other.url}/chat/completions'.*not sent"):
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
        lambda: VLA0Policy.from_pretrained(folder, config=PreTrainedConfig.from_pretrained(folder)),
        lambda: Agent.from_pretrained(folder, device="cpu"),
        lambda: remote((folder, learnt[1]), fake.url),  # the same one: who names it cannot be told
    ):
        with pytest.raises(
            ValueError, match="config.json names server='http.*cannot choose one: set it to null"
        ):
            load()
    with serving() as own:  # the caller's counts, or none
        policy, batch = remote((folder, learnt[1]), own.url)
        policy.predict_action_chunk(batch)
        assert own.requests and not fake.requests
    local, _ = remote((folder, learnt[1]), "null")
    assert local.config.server is None and not fake.requests


def test_an_interrupt_ends_at_once(learnt, fake, monkeypatch):
    """While two rows wait for a server that hangs: before the deadline, and the server is left."""
    fake.behaviour = write(*[b" "] * 3000, pause=0.02)
    policy, batch = remote(learnt, fake.url, server_timeout=1000, server_model="tiny")
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
    # Nothing of it keeps the process from ending.
    assert not [t for t in threading.enumerate() if t.name.startswith("vla0") and not t.daemon]
    fake.behaviour = "7 " * 13 + "7"
    assert (policy.predict_action_chunk(batch) == 7).all()


def test_acts_where_a_loop_runs_and_in_threads(learnt, fake):
    """As in a notebook, and in LeRobot's rollout."""
    policy, batch = remote(learnt, fake.url)

    async def cell():
        return policy.predict_action_chunk(batch)

    expected = asyncio.run(cell())
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(policy.predict_action_chunk, [batch] * 8))
    assert all(torch.equal(result, expected) for result in results)


# -------------------------------------------------------------------------------------- servers that restart


def test_nobody_there(learnt):
    policy, batch = remote(learnt, "http://127.0.0.1:9/v1", server_model="tiny")
    with pytest.raises(ConnectionError, match="ConnectError.*Is it running"):
        policy.predict_action_chunk(batch)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_that_is_starting_is_waited_for(host, learnt, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "STARTUP_S", 1000.0)
    with serving() as server:
        port = server.server_address[1]
    policy, batch = remote(learnt, f"http://{host}:{port}/v1", server_model="tiny")
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
    with pytest.raises(ValueError, match="do not begin with those that the robot is executing"):
        policy.predict_action_chunk(one, inference_delay=2, prev_chunk_left_over=left)


def test_an_address_without_v1(learnt, fake, monkeypatch):
    """Before the model's name is known, only the address can be wrong."""
    monkeypatch.setattr(FakeServer, "do_GET", lambda self: self.reply(404, {"detail": "Not Found"}))
    policy, batch = remote(learnt, fake.url)
    with pytest.raises(ConnectionError, match="status 404: .*Not Found.*'[.] Does the URL end in /v1[?]$"):
        policy.predict_action_chunk(batch)


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
    eval_with_a_server(learnt[0], fake.url, 6, tmp_path, process_env)
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
