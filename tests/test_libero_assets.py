import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from lerobot_vla0.libero import assets
from lerobot_vla0.libero.assets import ASSET_FOLDERS, STAND_INS, check_rendering, prepare_libero


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "libero"))
    return tmp_path


def test_stand_ins_are_small_complete_and_well_formed():
    files = [p for p in STAND_INS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 100_000
    assert all((STAND_INS / name).is_dir() for name in ASSET_FOLDERS)
    names = {ElementTree.parse(path).getroot().get("model") for path in STAND_INS.rglob("*.xml")}
    assert {"alphabet_soup", "bbq_sauce", "milk", "basket", "floor_arena"} <= names and len(names) == 12
    assert assets.is_primitive(STAND_INS) and assets.asset_name(STAND_INS) == "primitive_assets_v1"


@pytest.mark.slow
def test_first_use_writes_the_config_without_asking(home):
    """In a process without a terminal, where LIBERO's own import would stop at input()."""
    code = (
        "from lerobot_vla0.libero.assets import prepare_libero\n"
        "print(prepare_libero('libero_object', 'primitive'))\n"
        "from libero.libero import get_assets_path, get_libero_path\n"
        "print(get_assets_path(), get_libero_path('bddl_files'))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folder, (used, bddl) = result.stdout.split()[0], result.stdout.split()[-2:]
    assert folder == used == str(STAND_INS) and Path(bddl, "libero_object").is_dir()
    config = yaml.safe_load((home / "libero" / "config.yaml").read_text())
    assert Path(config["init_states"]).is_dir()


def test_assets_that_do_not_exist(home):
    with pytest.raises(ValueError, match="exists for libero_object only, not for libero_goal"):
        prepare_libero("libero_goal", "primitive")
    with pytest.raises(FileNotFoundError, match="is not auto, real, primitive or a folder with articulated"):
        prepare_libero("libero_object", str(home))


PREPARE = (
    "import sys; from lerobot_vla0.libero.assets import prepare_libero; "
    "print('FOLDER', prepare_libero(*sys.argv[1:]))"
)


def prepare(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """In a process of its own: the Hub's client reads its environment when imported."""
    command = [sys.executable, "-c", PREPARE, *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.slow
def test_auto_and_real_download_what_is_missing(home, hub):
    """The real Hub client against a local stand-in."""
    for name in ASSET_FOLDERS:
        folder = hub.root / "datasets/lerobot/libero-assets" / name
        folder.mkdir(parents=True)
        (folder / "object.xml").write_text("<mujoco/>")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf")}
    result = prepare("libero_spatial", "real", **online)
    folder = Path(result.stdout.split("FOLDER ")[1].strip())
    assert (folder / "turbosquid_objects/object.xml").read_text() == "<mujoco/>"
    assert assets.asset_name(folder) == "real" and not assets.is_primitive(folder)
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    assert f"FOLDER {folder}\n" in prepare("libero_goal", "auto", **offline).stdout


@pytest.mark.slow
def test_no_assets_and_no_network(home):
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home / "hf")}
    result = prepare("libero_spatial", "auto", **offline)
    message = result.stderr.split("FileNotFoundError: ")[-1].strip().splitlines()
    assert len(message) == 2
    assert message[0].startswith("libero_spatial needs LIBERO's assets, and they could not be downloaded")
    assert "hf download lerobot/libero-assets" in message[1] and "assets=<folder>" in message[1]
    result = prepare("libero_object", "auto", **offline)
    assert "primitive_assets_v" in result.stdout
    assert result.stderr.count("not LIBERO scores") == 1
    assert "could not be downloaded" in prepare("libero_object", "real", **offline).stderr


def test_no_rendering_library(monkeypatch):
    monkeypatch.setattr(assets, "find_library", lambda name: None)
    monkeypatch.setattr(assets.platform, "system", lambda: "Linux")
    monkeypatch.delitem(sys.modules, "robosuite", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(RuntimeError, match="MUJOCO_GL=osmesa, but its library is missing: install libosm"):
        check_rendering()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl, but its library is missing: install libegl1"):
        check_rendering()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(assets, "find_library", lambda name: f"lib{name}.so")
    check_rendering()
    assert os.environ["MUJOCO_GL"] == "osmesa"
