"""Settings of NVlabs/vla0: what is read, what is asked for, what is refused by name."""

from pathlib import Path

import pytest
import yaml

from lerobot_vla0.convert.import_nvlabs import PeerOptions, nvlabs_settings

QWEN = {
    "action_type": "original", "original_action_dim": 7, "horizon": 8, "history": 1, "num_cam": 2,
    "qwen_model_id": "Qwen/Qwen2.5-VL-3B-Instruct", "use_lora": False, "use_qlora": False, "lora_rank": 8,
    "lora_config": "default", "rgb_input": True, "rgb_img_size": (224, 224), "add_vision_id": True,
    "tiled_rgb_imgs": True, "num_bins_actions": 1000, "action_mask_aug_per": 0.4, "attention_dropout": 0.0,
    "use_flash_attention_2": False,
}  # fmt: skip
OPTIONS = "IMAGE.crop_img:0.875:IMAGE.img_size:224:IMAGE.cam_list:('3p1','3p2')"
LIBERO = "libs/RoboVerse/roboverse/configs/img_libero_aug.yaml"
OWN = "libs/RoboVerse/roboverse/configs/img_mine.yaml"
KEYS = ["observation.images.image", "observation.images.image2"]


@pytest.fixture
def read(tmp_path):
    """Writes runs/vla0/config.yaml and reads it."""

    def read(options=OPTIONS, version="4.57.3", path=LIBERO, loader=None, given=None, **qwen):
        roboverse = {"cfg_path": path, "cfg_opts": options} | (loader or {})
        config = {
            "EXP": {"MODEL": "qwen"},
            "MODEL": {"QWEN": QWEN | qwen},
            "DATALOADER": {"ROBOVERSE": roboverse},
        }
        file = tmp_path / "runs/vla0/config.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.dump(config))  # tuples become !!python/tuple
        return nvlabs_settings(file, PeerOptions(**(given or {})), version)

    return read


def write_yaml(folder: Path, settings: dict, path: str = OWN) -> Path:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.dump(settings))
    return file


@pytest.mark.parametrize(
    ("version", "expected"),
    [("4.49.0", False), ("4.50.3", False), ("4.51.3", False), ("4.51.0.dev0", False), ("4.52.4", True),
     ("4.57.3", True), ("5.0.0", True), ("5.5.0.dev0", True)],
)  # fmt: skip
def test_vision_id_by_version(version, expected, read):
    cameras, dim, settings, why = read(version=version)
    assert (cameras, dim, settings["add_vision_id"]) == (KEYS, 7, expected)
    assert (
        f"add_vision_id={str(expected).lower()}" in why
        and f"transformers {version}" in why
        and "\n" not in why
    )
    assert read(version=version, add_vision_id=False)[2]["add_vision_id"] is False
    for given in (True, False):
        assert read(version=version, given={"add_vision_id": given})[2]["add_vision_id"] is given


@pytest.mark.parametrize("version", [None, "unknown", "4.52.0.dev0"])
def test_vision_id_is_asked_for_without_a_version(version, read):
    with pytest.raises(ValueError, match=f"names the version {version!r}.*--add_vision_id=false if"):
        read(version=version)
    assert read(version=version, given={"add_vision_id": True})[2]["add_vision_id"] is True
    assert read(version=version, add_vision_id=False)[2]["add_vision_id"] is False


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (":LEROBOT.repo_id:me/my_data", {}),
        (":LEROBOT.convert_ori_act_to_delta_act:False:LEROBOT.fps:-1", {}),
        (":IMAGE.crop_img:0.9", {"crop_ratio": 0.9}),  # the last one counts
        (":IMAGE.cam_list:['3p2', '3p1']", {"cameras": KEYS[::-1]}),
        (":IMAGE.img_size:0:horizon:8:history:1:unifier:image", {"image_size": 224}),
        (":IMAGE.hue_aug:0.1:IMAGE.return_proprio:True:LEROBOT.remove_noop_actions:True", {}),
    ],
)
def test_options_as_yacs_reads_them(options, changed, read):
    cameras, _, settings, _ = read(OPTIONS + options)
    expected = {"crop_ratio": 0.875, "image_size": 224, "cameras": KEYS} | changed
    assert {"cameras": cameras} | settings | expected == {"cameras": cameras} | settings


@pytest.mark.parametrize("empty", ["", None])
def test_without_options_the_yaml_decides(empty, read, tmp_path):
    image = {"crop_img": 0.9, "img_size": 224, "cam_list": "('3p1', '3p2')"}
    lerobot = {"repo_id": "me/data", "le_cam_list": ["top", "wrist"], "rv_cam_list": ["3p1", "3p2"]}
    for folder in (tmp_path, tmp_path / "runs/vla0"):  # NVlabs' own place; beside config.yaml
        place = OWN if folder == tmp_path else Path(OWN).name
        file = write_yaml(folder, {"IMAGE": image, "LEROBOT": lerobot}, place)
        cameras, _, settings, _ = read(empty, path=OWN)
        assert (cameras, settings["crop_ratio"]) == (["top", "wrist"], 0.9)
        file.unlink()
    file = write_yaml(tmp_path / "elsewhere", {"IMAGE": {"cam_list": ["3p1", "3p2"]}})
    cameras, _, settings, _ = read(empty, path=OWN, given={"data_config": file})
    assert (cameras, settings["crop_ratio"], settings["image_size"]) == (KEYS, 1.0, 224)
    with pytest.raises(FileNotFoundError, match="--data_config='nowhere' is not there"):
        read(empty, path=OWN, given={"data_config": Path("nowhere")})


def test_what_is_not_recorded_is_asked_for(read):
    with pytest.raises(
        ValueError, match="does not say IMAGE.crop_img.*img_libero_aug.yaml is not at hand.*--crop_ratio"
    ):
        read("")
    with pytest.raises(ValueError, match="2 cameras, which it does not name.*--cameras="):
        read("", given={"crop_ratio": 0.875})
    cameras, _, settings, _ = read("", given={"crop_ratio": 0.8, "cameras": ["a", "b"], "image_size": 224})
    assert (cameras, settings["crop_ratio"], settings["image_size"]) == (["a", "b"], 0.8, 224)
    with pytest.raises(ValueError, match="--image_size=112 contradicts .*which says 224"):
        read("", given={"image_size": 112})


DELTA = "LEROBOT.convert_ori_act_to_delta_act"


def test_delta_actions_are_refused(read, tmp_path):
    refused = f"{DELTA} is True; imported can be False only"
    with pytest.raises(ValueError, match=refused):
        read(f"{OPTIONS}:{DELTA}:True")
    with pytest.raises(ValueError, match=refused):
        read(loader={"convert_ori_act_to_delta_act": True})
    with pytest.raises(
        ValueError, match=f"img_mine.yaml, which is not at hand.*deltas.*{DELTA}.*--data_config="
    ):
        read(path=OWN)
    assert read(f"{OPTIONS}:{DELTA}:False", path=OWN)[0] == KEYS
    for path in (OWN, LIBERO):
        write_yaml(tmp_path, {"LEROBOT": {"convert_ori_act_to_delta_act": True}}, path)
        with pytest.raises(ValueError, match=refused):
            read(path=path)


@pytest.mark.parametrize(
    ("options", "qwen", "message"),
    [
        ("", {"history": 2}, "MODEL.QWEN.history is 2; imported can be 1 only"),
        ("", {"action_type": "ee"}, "MODEL.QWEN.action_type is 'ee'"),
        ("", {"use_lora": True}, "MODEL.QWEN.use_lora is True"),
        ("", {"rgb_input": False}, "MODEL.QWEN.rgb_input is False"),
        ("", {"include_state": True}, "MODEL.QWEN.include_state is True"),
        ("", {"system_message_version": 2}, "MODEL.QWEN.system_message_version is 2"),
        ("", {"num_cam": 1}, "MODEL.QWEN.num_cam is 1; imported can be 2 only"),
        ("", {"rgb_img_size": (224, 320)}, r"MODEL.QWEN.rgb_img_size is \[224, 320\]"),
        ("", {"depth_input": True}, "MODEL.QWEN.depth_input is True. This setting is unknown here"),
        (":LEROBOT.fps:5", {}, "LEROBOT.fps is 5; imported can be -1 only"),
        (":horizon:4", {}, "horizon of the data is 4; imported can be 8 only"),
        (":unifier:pointcloud", {}, "unifier is 'pointcloud'"),
        (":IMAGE.flip:True", {}, "IMAGE.flip is True. This setting is unknown here"),
        (":IMAGE.flip", {}, "must be pairs, name:value:name:value; it has 7 parts"),
        (":IMAGE.crop_img:most", {}, "IMAGE.crop_img is 'most'; it must be a number"),
    ],
)  # fmt: skip
def test_refused_by_name(options, qwen, message, read):
    with pytest.raises(ValueError, match=message):
        read(OPTIONS + options, **qwen)


BOMB = "a: &a {x: 1}\n" + "".join(
    f"{c}: &{c} {{{', '.join(f'k{i}: *{p}' for i in range(9))}}}\n"
    for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        "x: &x {y: *x}",
        "{a: " * 3000,
        "\x00",
        "[]",
        "3",
        "x: '" + "(" * 500 + "'",
        "!!python/name:os.system",
    ],
)
@pytest.mark.parametrize("which", ["config", "data"])
def test_yaml_of_a_stranger(which, content, read, tmp_path):
    if which == "data":
        write_yaml(tmp_path, {}).write_text(content)
        with pytest.raises(ValueError, match=r"img_mine.yaml is damaged|config.yaml: x is"):
            read(path=OWN)
    else:
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match="config.yaml is no config of NVlabs"):
            nvlabs_settings(tmp_path / "config.yaml", PeerOptions(), "4.57.3")


@pytest.mark.parametrize("path", ["../img_mine.yaml", "ABSOLUTE"])
def test_data_yaml_elsewhere_is_not_read(path, read, tmp_path):
    file = write_yaml(tmp_path / "runs", {}, "img_mine.yaml")
    with pytest.raises(ValueError, match="which is not at hand"):
        read(path=str(file) if path == "ABSOLUTE" else path)
