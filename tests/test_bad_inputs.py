"""What a user can do wrong: a command ends with one message that names it and exit status 1, without a
traceback, and writes nothing."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import make_act, make_config, make_stats

from lerobot_vla0.cli import main
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors


@pytest.fixture(scope="module")
def world(tiny_vlm, tmp_path_factory) -> Path:
    """Folders that are right; tests damage copies of them."""
    root = tmp_path_factory.mktemp("world")
    policy = VLA0Policy(make_config(tiny_vlm))
    for part in (policy, *make_vla0_pre_post_processors(policy.config, make_stats())):
        part.save_pretrained(root / "checkpoint")
    make_act(root / "act")
    shutil.copytree(tiny_vlm, root / "vlm")
    return root


@pytest.fixture
def place(world, tmp_path, monkeypatch) -> Path:
    """A working directory with the world in it, and without network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for path in world.iterdir():
        Path(path.name).symlink_to(path)
    Path("full").mkdir()
    for name in ("full/file", "file"):
        Path(name).touch()
    return tmp_path


def ends(command: str, capsys: pytest.CaptureFixture) -> str:
    """The message with which a command ends. Nothing is written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    assert sorted(Path().rglob("*")) == before
    if isinstance(stop.value.code, str):  # Python prints it and exits with 1
        return stop.value.code
    assert stop.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


POLICY = "--policy.path=checkpoint"
OPTIONS = [
    ("frobnicate", "unknown command 'frobnicate'"),
    ("merge --frobnicate=1 --out=out", "unrecognized arguments: --frobnicate=1"),
    ("merge stray --out=out", "unrecognized arguments: stray"),
    ("merge", "out"),
    ("merge --out=out", "--policy.path=<checkpoint folder or Hub repo>"),
    ("export --policy.path=/nonexistent/x --out=out", "'/nonexistent/x' is neither a folder nor a Hub repo"),
    ("export --policy.path=no/repo --out=out", "'no/repo' is neither a folder nor a Hub repo"),
    ("export --policy.path=file --out=out", "'file' is neither a folder nor a Hub repo"),
    ("export --policy.path=act --out=out", "act holds a policy of type 'act', not vla0"),
    ("export --policy.path=vlm --out=out", "Missing 'type' field in config.json of vlm"),
    (f"export {POLICY} --policy.type=act --out=out", "both --policy.path and --policy.type"),
    (f"export {POLICY} --out=full", "out='full' exists and is not empty. Choose another or remove it"),
    (f"export {POLICY} --out=file", "out='file' is there and is no folder. Name another"),
    (
        f"export {POLICY} --out=out --policy.chunk_size=0",
        "chunk_size=0 is not allowed: it must be",
    ),
    (
        f"export {POLICY} --out=out --policy.chunk_size=many",
        "`chunk_size`: Couldn't parse 'many'",
    ),
    (f"export {POLICY} --out=out --policy.num_bins=9", "num_bins=9 differs from the checkpoint's 1000"),
    (f"merge {POLICY} --out=out", "checkpoint is no adapter"),
]


@pytest.mark.parametrize(("command", "message"), OPTIONS, ids=[command for command, _ in OPTIONS])
def test_options(command, message, place, capsys):
    assert re.search(re.escape(message), ends(command, capsys))


def with_(value: object, *path: str) -> Callable[[dict], None]:
    """Sets a field of a JSON file."""

    def change(saved: dict) -> None:
        for name in path[:-1]:
            saved = saved[name]
        saved[path[-1]] = value

    return change


POST = "policy_postprocessor.json"
STATE = "policy_postprocessor_step_1_unnormalizer_processor.safetensors"
# File, its new content (None: removed; a function: changed JSON), and what is said.
DAMAGES = [
    ("config.json", None, "config.json"),
    ("config.json", with_("x", "num_bins"), "`num_bins`: Couldn't parse 'x' into an int"),
    ("config.json", with_(1, "unknown"), "`unknown`"),
    ("model.safetensors", None, "bad is no VLA-0 checkpoint: model.safetensors is missing"),
    ("model.safetensors", b"short", "model.safetensors is damaged"),
    ("vlm", None, "bad is no VLA-0 checkpoint: vlm/config.json is missing"),
    ("vlm/config.json", with_("bert", "model_type"), "is a 'bert' model"),
    ("vlm/config.json", with_(64, "text_config", "intermediate_size"), "size mismatch"),
    ("adapter_config.json", b"{", "adapter_config.json is damaged"),
    (POST, b"\xff", f"{POST} is damaged"),
    (POST, b"{}", f"{POST} is damaged (KeyError: 'steps')"),
    (STATE, None, STATE),
    (STATE, b"short", f"{STATE} is damaged"),
]


@pytest.mark.parametrize(("file", "content", "message"), DAMAGES)
def test_damaged_checkpoint(file, content, message, place, world, capsys):
    shutil.copytree(world / "checkpoint", "bad")
    path = Path("bad", file)
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        saved = json.loads(path.read_text())
        content(saved)
        path.write_text(json.dumps(saved))
    assert message in ends("export --policy.path=bad --out=out", capsys)
