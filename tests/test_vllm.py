"""Acting with a real serving engine: vLLM on a CPU, started on the export of a policy with random weights.

Needs an interpreter that has vLLM, named by VLA0_VLLM_PYTHON; `make test-vllm` makes one and runs this.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
from conftest import eval_with_a_server, make_batch, make_config, make_stats, observation, randomise
from lerobot.configs import PreTrainedConfig
from tiny_vlm import TinyVLMConfig, make_tiny_vlm

from lerobot_vla0.cli import main
from lerobot_vla0.decoding import server as server_module
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

PYTHON = os.environ.get("VLA0_VLLM_PYTHON")
if not PYTHON:
    pytest.skip("needs vLLM: make test-vllm, or set VLA0_VLLM_PYTHON", allow_module_level=True)
pytestmark = pytest.mark.slow

START_S = 600  # vLLM has taken 256 s on two busy cores
BATCHES, ROWS = 5, 8  # 40 observations


class Engine:
    """vLLM's server of a folder, on a port that stays the same when it is started again."""

    def __init__(self, folder: Path, log: Path, env: dict[str, str]):
        # The interpreter has another Transformers than this one.
        env = {name: value for name, value in env.items() if name != "PYTHONPATH"}
        self.folder, self.log = folder, log
        self.env = {**env, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Returns when it answers; fails with its output if it ends, or takes too long."""
        command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", f"--model={self.folder}", "--host=127.0.0.1",
            f"--port={self.port}", "--max-model-len=1024", "--enforce-eager", "--dtype=float32",
        ]  # fmt: skip
        with self.log.open("w") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(command, env=self.env, start_new_session=True, **streams)
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        pytest.fail(
            f"vLLM does not answer (exit status {self.process.poll()}):\n{self.log.read_text()[-6000:]}"
        )

    def kill(self) -> None:
        """Without notice, all its processes; 3 MB of shared memory stay behind in /dev/shm."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def close(self) -> None:
        """In order, so that it removes its shared memory."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Two heads: vLLM's attention on a CPU takes widths of 32 and more for a head."""
    folder = tmp_path_factory.mktemp("served")
    vlm = make_tiny_vlm(TinyVLMConfig(out=folder / "vlm", num_heads=2))
    policy = VLA0Policy(make_config(vlm)).eval()
    randomise(policy)
    for part in (policy, *make_vla0_pre_post_processors(policy.config, make_stats())):
        part.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def engine(checkpoint, process_env, tmp_path_factory):
    assert Path(PYTHON).is_file(), f"VLA0_VLLM_PYTHON={PYTHON} does not exist: make test-vllm makes one."
    folder = tmp_path_factory.mktemp("vllm")
    main(["export", f"--policy.path={checkpoint}", f"--out={folder / 'exported'}"])
    engine = Engine(folder / "exported", folder / "serve.log", process_env)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def batches(checkpoint) -> list[dict]:
    config = PreTrainedConfig.from_pretrained(checkpoint)
    preprocess, _ = make_vla0_pre_post_processors(config, make_stats())
    return [observation(preprocess(make_batch(ROWS, seed=seed))) for seed in range(BATCHES)]


@pytest.fixture(scope="module")
def chunks(checkpoint, batches) -> list[torch.Tensor]:
    """What local decoding writes."""
    policy = VLA0Policy.from_pretrained(checkpoint)
    chunks = [policy.predict_action_chunk(batch) for batch in batches]
    distinct = {tuple(chunk.flatten().tolist()) for chunk in torch.cat(chunks)}
    assert len(distinct) == BATCHES * ROWS  # so that equal integers mean something
    return chunks


def remote(checkpoint: Path, url: str) -> VLA0Policy:
    """As LeRobot's scripts load `--policy.path=... --policy.server=...`."""
    config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=[f"--server={url}"])
    return VLA0Policy.from_pretrained(checkpoint, config=config)


def row(batch: dict, index: int) -> dict:
    return observation(batch, slice(index, index + 1))


def test_batches_and_single_rows_get_the_local_integers(engine, checkpoint, batches, chunks):
    policy = remote(checkpoint, engine.url)
    for batch, chunk in zip(batches, chunks, strict=True):
        assert torch.equal(policy.predict_action_chunk(batch), chunk)
        for index in range(ROWS):
            assert torch.equal(policy.predict_action_chunk(row(batch, index))[0], chunk[index])


def test_real_time_chunking(engine, checkpoint, batches, chunks):
    """The committed timesteps are the beginning, and the rest is what local decoding writes after them."""
    left = (1000 - chunks[0])[:, 2:]  # which the policy would not write
    settings = {"inference_delay": 3, "prev_chunk_left_over": left}
    served = remote(checkpoint, engine.url).predict_action_chunk(batches[0], **settings)
    assert torch.equal(served[:, :3], left[:, :3]) and not torch.equal(served[:, 3:], chunks[0][:, 3:])
    local = VLA0Policy.from_pretrained(checkpoint).predict_action_chunk(batches[0], **settings)
    assert torch.equal(served, local)


def test_the_grammar_is_enforced(engine, checkpoint, batches, caplog):
    """It is sent and not refused, and without it these weights write no actions."""
    policy = remote(checkpoint, engine.url)
    with caplog.at_level(logging.WARNING):
        policy.predict_action_chunk(row(batches[0], 0))
    assert policy.decoder.takes_grammar and not caplog.records
    policy.decoder.takes_grammar = False
    with pytest.raises(ValueError, match="wrote no actions: expected 56 integers, got"):
        policy.predict_action_chunk(row(batches[0], 0))


def test_lerobot_eval(engine, checkpoint, tmp_path, process_env):
    """LeRobot's script, two environments at once: a request each for every eight steps."""

    answers = '"POST /v1/chat/completions HTTP/1.1" 200'
    before = engine.log.read_text().count(answers)
    eval_with_a_server(checkpoint, engine.url, 10, tmp_path, process_env)
    assert engine.log.read_text().count(answers) - before == 2 * 2


def test_goes_on_after_a_restart_whatever_the_folder_asks_for(
    engine, checkpoint, batches, chunks, caplog, monkeypatch
):
    """vLLM is killed while it answers, and starts again with a generation_config.json as base models have
    it, which it applies to every request that does not say otherwise."""
    policy, done = remote(checkpoint, engine.url), []

    def evaluate():
        for _ in range(3):
            for batch in batches:
                done.append(policy.predict_action_chunk(batch))

    with ThreadPoolExecutor() as pool, caplog.at_level(logging.WARNING):
        evaluation = pool.submit(evaluate)
        while len(done) < 2:
            assert not evaluation.done(), evaluation.result()
            time.sleep(0.01)
        engine.kill()
        assert len(done) < 5
        path = engine.folder / "generation_config.json"
        asked = {"do_sample": True, "repetition_penalty": 1.3, "top_k": 20, "top_p": 0.8}
        path.write_text(json.dumps(json.loads(path.read_text()) | asked))
        engine.start()
        evaluation.result()
    assert all(torch.equal(*pair) for pair in zip(done, chunks * 3, strict=True))
    assert sum("refuses connections. Is it starting?" in r.getMessage() for r in caplog.records) == 1
    monkeypatch.setattr(server_module, "NEUTRAL", {})
    assert not torch.equal(policy.predict_action_chunk(batches[0]), chunks[0])
