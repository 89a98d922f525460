import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from lerobot_vla0.libero import assets
from lerobot_vla0.libero.assets import ASSET_FOLDERS, check_rendering, prepare_libero
from lerobot_vla0.libero.primitives import OBJECTS, write_primitive_assets


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "libero"))
    return tmp_path


def test_primitives_are_small_complete_and_well_formed(tmp_path):
    folder = write_primitive_assets(tmp_path / "assets")
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 100_000
    assert all((folder / name).is_dir() for name in ASSET_FOLDERS)
    for path in folder.rglob("*.xml"):
        ElementTree.parse(path)
    assert {p.stem for p in (folder / "stable_hope_objects").rglob("*.xml")} == set(OBJECTS)
    marker = folder / "marker"
    marker.touch()
    assert write_primitive_assets(folder) == folder and marker.exists()  # an existing folder is left as it is
    assert [p.name for p in tmp_path.iterdir()] == ["assets"]


@pytest.mark.slow
def test_first_use_writes_the_config_without_asking(home):
    """In a process without a terminal, where LIBERO's own import would stop at input()."""
    code = (
        "from lerobot_vla0.libero.assets import prepare_libero\n"
        "print(prepare_libero('libero_object', 'primitive'))\n"
        "from libero.libero import get_assets_path, get_libero_path\n"
        "print(get_assets_path(), get_libero_path('bddl_files'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert result.returncode == 0, result.stderr
    folder, (used, bddl) = result.stdout.split()[0], result.stdout.split()[-2:]
    assert folder == used and Path(folder).is_relative_to(home / "cache")
    assert Path(bddl, "libero_object").is_dir()
    config = yaml.safe_load((home / "libero" / "config.yaml").read_text())
    assert Path(config["init_states"]).is_dir()


def test_config_that_points_to_a_removed_environment(home):
    (home / "libero").mkdir()
    (home / "libero" / "config.yaml").write_text("bddl_files: /gone/bddl\ninit_states: /gone/init\n")
    with pytest.raises(
        FileNotFoundError, match="config.yaml points to folders that do not exist.*Delete the file"
    ):
        prepare_libero("libero_object", "primitive")


def test_primitives_are_for_libero_object_only(home):
    with pytest.raises(ValueError, match="exists for libero_object only, not for libero_goal"):
        prepare_libero("libero_goal", "primitive")


def test_folder_that_holds_no_assets(home):
    with pytest.raises(
        FileNotFoundError, match="neither 'auto', 'real', 'primitive' nor a folder with articulated"
    ):
        prepare_libero("libero_object", str(home))


def make_assets(folder: Path) -> Path:
    for name in ASSET_FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "object.xml").write_text("<mujoco/>")
    return folder


def test_auto_and_real_take_installed_assets(home, monkeypatch):
    monkeypatch.setattr(assets, "snapshot_download", pytest.fail)
    cached = make_assets(home / ".cache/libero/assets")
    for choice in ("auto", "real"):
        assert assets._asset_folder("libero_object", choice, home / "package") == cached
    package = make_assets(home / "package/assets")
    assert assets._asset_folder("libero_goal", "auto", home / "package") == package
    assert assets.asset_name(package) == "real" and not assets.is_primitive(package)


PREPARE = (
    "import sys; from lerobot_vla0.libero.assets import prepare_libero; "
    "print('FOLDER', prepare_libero(*sys.argv[1:]))"
)


def prepare(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """In a process of its own: the Hub's client reads its environment when imported."""
    return subprocess.run(
        [sys.executable, "-c", PREPARE, *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_auto_and_real_download_what_is_missing(home, hub):
    """The real Hub client against a local stand-in; hf-libero's empty folder is in the way."""
    make_assets(hub.root / "datasets/lerobot/libero-assets")
    cached = home / ".cache/libero/assets"
    cached.mkdir(parents=True)
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf")}
    result = prepare("libero_spatial", "real", **online)
    assert f"FOLDER {cached}\n" in result.stdout, result.stderr
    assert "4/4" in result.stderr  # the client's progress bar
    assert (cached / "turbosquid_objects/object.xml").read_text() == "<mujoco/>"
    asked = len(hub.requests)
    assert f"FOLDER {cached}\n" in prepare("libero_goal", "auto", **online).stdout
    assert len(hub.requests) == asked  # now installed


@pytest.mark.slow
def test_a_download_cut_short_is_not_taken_for_complete(home, hub):
    make_assets(hub.root / "datasets/lerobot/libero-assets")
    (hub.root / "datasets/lerobot/libero-assets/stable_hope_objects/object.xml").unlink()
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf")}
    result = prepare("libero_spatial", "real", **online)
    assert "libero-assets lacks some of articulated_objects" in result.stderr
    assert not (home / ".cache/libero/assets").exists()


@pytest.mark.slow
@pytest.mark.parametrize("network", ["off", "unreachable"])
def test_no_assets_and_no_network(home, network):
    offline = {"HF_HUB_OFFLINE": "1"}
    if network == "unreachable":
        offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
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
    with pytest.raises(RuntimeError, match="install libosmesa6 and set MUJOCO_GL=osmesa"):
        check_rendering()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl, but its library is missing: install libegl1"):
        check_rendering()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(assets, "find_library", lambda name: f"lib{name}.so")
    check_rendering()
    assert os.environ["MUJOCO_GL"] == "osmesa"
