"""Settings of NVlabs/vla0, and statistics of the actions, which are pickled: nothing of a pickle is run."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from peers import WORDS, write_config

from lerobot_vla0.convert.peer_files import nvlabs_settings, read_stats

OWN_YAML = "libs/RoboVerse/roboverse/configs/img_mine.yaml"
KEYS = ["observation.images.image", "observation.images.image2"]
DELTA = "LEROBOT.convert_ori_act_to_delta_act"


@pytest.fixture
def read(tmp_path):
    """Writes runs/vla0/config.yaml and reads it."""

    def read(words=WORDS, version="4.57.3", data_config=None, **config):
        return nvlabs_settings(write_config(tmp_path / "runs/vla0", words, **config), version, data_config)

    return read


def write_yaml(folder: Path, settings: dict, path: str = OWN_YAML) -> Path:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.dump(settings))
    return file


@pytest.mark.parametrize(
    ("version", "expected"),
    [("4.49.0", False), ("4.51.3", False), ("4.51.0.dev0", False), ("4.52.4", True), ("5.5.0.dev0", True),
     ("4.52.0.dev0", None), (None, None), ("unknown", None)],
)  # fmt: skip
def test_vision_id_by_version(version, expected, read):
    """Transformers before 4.52 dropped add_vision_id, whatever config.yaml says."""
    dim, settings, reason = read(version=version)
    assert (settings["cameras"], dim, settings["add_vision_id"]) == (KEYS, 7, expected)
    assert expected is None or str(version) in reason
    assert read(version=version, add_vision_id=False)[1]["add_vision_id"] is False


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (":IMAGE.crop_img:0.9", {"crop_ratio": 0.9}),  # the last one counts
        (":IMAGE.cam_list:['3p2', '3p1']", {"cameras": KEYS[::-1]}),
        (":IMAGE.img_size:0:horizon:8:history:1:unifier:image", {"image_size": 224}),
        (f":IMAGE.hue_aug:0.1:{DELTA}:False:LEROBOT.repo_id:me/data", {}),
    ],
)
def test_options_as_yacs_reads_them(words, changed, read):
    settings = read(WORDS + words)[1]
    expected = {"crop_ratio": 0.875, "image_size": 224, "cameras": KEYS, "picture_rule": "NVlabs"} | changed
    assert settings | expected == settings


def test_without_options_the_yaml_decides(read, tmp_path):
    image = {"crop_img": 0.9, "img_size": 224, "cam_list": "('3p1', '3p2')"}
    lerobot = {"repo_id": "me/data", "le_cam_list": ["top", "wrist"], "rv_cam_list": ["3p1", "3p2"]}
    for folder in (tmp_path, tmp_path / "runs/vla0"):  # NVlabs' own layout; beside config.yaml
        path = OWN_YAML if folder == tmp_path else Path(OWN_YAML).name
        file = write_yaml(folder, {"IMAGE": image, "LEROBOT": lerobot}, path)
        settings = read(None, path=OWN_YAML)[1]
        assert (settings["cameras"], settings["crop_ratio"]) == (["top", "wrist"], 0.9)
        file.unlink()
    file = write_yaml(tmp_path / "elsewhere", {"IMAGE": {"cam_list": ["3p1", "3p2"]}})
    settings = read("", path=OWN_YAML, data_config=file)[1]
    assert (settings["cameras"], settings["crop_ratio"], settings["image_size"]) == (KEYS, 1.0, 224)
    assert read("")[1] | {"cameras": None, "crop_ratio": None} == read("")[1]  # asked for by the command


def test_delta_actions_are_refused(read, tmp_path):
    refused = f"{DELTA} is True; only False can be imported"
    with pytest.raises(ValueError, match=refused):
        read(f"{WORDS}:{DELTA}:True")
    with pytest.raises(ValueError, match=refused):
        read(loader={"convert_ori_act_to_delta_act": True})
    with pytest.raises(
        ValueError, match="img_mine.yaml, which says whether actions are deltas.*--data_config="
    ):
        read(path=OWN_YAML)
    write_yaml(tmp_path / "runs", {}, "img_mine.yaml")
    with pytest.raises(ValueError, match="img_mine.yaml, which says"):  # nothing outside of the folders
        read(path="../img_mine.yaml")
    write_yaml(tmp_path, {"LEROBOT": {"convert_ori_act_to_delta_act": True}})
    with pytest.raises(ValueError, match=refused):
        read(path=OWN_YAML)


@pytest.mark.parametrize(
    ("words", "qwen", "message"),
    [
        ("", {"history": 2}, "QWEN.history is 2; only 1 can be imported"),
        ("", {"include_state": True}, "QWEN.include_state is True"),
        ("", {"depth_input": True}, "QWEN.depth_input=True is unknown"),
        (":LEROBOT.fps:5", {}, "LEROBOT.fps is 5; only -1 can be imported"),
        (":IMAGE.flip:True", {}, "IMAGE.flip=True is unknown"),
    ],
)
def test_refused_by_name(words, qwen, message, read):
    with pytest.raises(ValueError, match=message):
        read(WORDS + words, **qwen)


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system [exit]")
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        nvlabs_settings(tmp_path / "config.yaml", "4.57.3", None)


# -------------------------------------------------------------------------------- statistics of the actions


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("dtype", ["f8", ">f8", "f4", "i8", "u1", list])
def test_pickled_arrays(protocol, dtype, tmp_path):
    low, high = [0.0, 0.0], [0.0, 1.0]
    if dtype is not list:
        low, high = np.array(low).astype(dtype), np.array(high).astype(dtype)
    stats = {"out_ori_act": {"min": low, "max": high, "count": np.array([3])}, "other": (None, np.int64(3))}
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps(stats, protocol))
    found = read_stats(tmp_path / "stats.pkl")
    assert (found["min"].tolist(), found["max"].tolist()) == ([0.0, 0.0], [0.0, 1.0])


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def instructions(code: bytes) -> bytes:
    """A pickle of statistics whose "min" is made by `code`."""
    return b"\x80\x04}\x8c\x0bout_ori_act}(\x8c\x03min" + code + b"\x8c\x03max](K\x01K\x01eus."


@pytest.mark.parametrize("protocol", [0, 4])
def test_hostile_pickle_does_not_run(protocol, tmp_path):
    hostile = {"out_ori_act": {"min": [0], "max": [1]}, "other": Call(os.system, f"touch {tmp_path / 'ran'}")}
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps(hostile, protocol))
    with pytest.raises(ValueError, match="stats.pkl is no pickle of numbers .*it names posix.system"):
        read_stats(tmp_path / "stats.pkl")
    assert not (tmp_path / "ran").exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
OBJECT = b"cnumpy\ndtype\n\x8c\x01O\x89\x88\x87R(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"
REFUSED = {
    "objects as a list": pickle.dumps({"out_ori_act": {"min": np.array([1, None]), "max": np.array([1])}}),
    "objects as memory": instructions(ARRAY + b"(K\x01K\x01\x85" + OBJECT + b"\x89C\x08" + bytes(8) + b"tb"),
    "a class of NumPy made": instructions(b"cnumpy\nndarray\nK\x01\x85\x81"),
    "a dotted name": instructions(b"\x8c\x05numpy\x8c\x10dtype.__reduce__\x93"),
    "a persistent object": instructions(b"Pname\n"),
    "the extension registry": instructions(b"\x82\x01"),
    "the state of a function": instructions(b"cnumpy\ndtype\n}b"),
    "a truncated file": instructions(b"X\xff\xff\xff\x7f"),
    "an empty file": b"",
    "nested lists": pickle.dumps({"out_ori_act": {"min": [[0]], "max": [[1]]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_pickles(name, tmp_path):
    (tmp_path / "stats.pkl").write_bytes(REFUSED[name])
    with pytest.raises(ValueError, match="stats.pkl is (no pickle of numbers|damaged)"):
        read_stats(tmp_path / "stats.pkl")
