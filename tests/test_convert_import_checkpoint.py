"""Imported checkpoints act as the code they were trained with: written down here once more, from its
description."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_config, make_stats, observation, randomise, shared
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, PICTURES, make_tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor
from transformers.image_processing_utils import BatchFeature

from lerobot_vla0.cli import main
from lerobot_vla0.convert import export as export_module
from lerobot_vla0.convert import import_checkpoint as module
from lerobot_vla0.convert import weights
from lerobot_vla0.demo.tiny_vlm import make_config as make_vlm_config
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors
from lerobot_vla0.task_stats import PREFIX

INSTRUCTION = "put the white mug on the left plate"
LOW = [-0.9375, -0.9375, -0.9375, -0.2582143, -0.375, -0.3675, -1.0]
HIGH = [0.9375, 0.9375, 0.9375, 0.3557143, 0.375, 0.375, 1.0]
QWEN = {
    "action_type": "original", "original_action_dim": 7, "horizon": 8, "history": 1, "num_cam": 2,
    "qwen_model_id": "Qwen/Qwen2.5-VL-3B-Instruct", "use_lora": False, "use_qlora": False,
    "rgb_input": True, "rgb_img_size": (224, 224), "add_vision_id": True, "tiled_rgb_imgs": True,
    "num_bins_actions": 1000, "action_mask_aug_per": 0.4,
}  # fmt: skip
OPTIONS = "IMAGE.crop_img:0.875:IMAGE.img_size:224:IMAGE.cam_list:('3p1','3p2')"


def save_model(vlm: Path, folder: Path, seed: int = 3) -> Path:
    """As the three codes do: a Transformers folder, the processor made for a picture of 224×448."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(vlm, min_pixels=224 * 448, max_pixels=224 * 448)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tiny_vlm, tmp_path_factory) -> Path:
    return save_model(tiny_vlm, tmp_path_factory.mktemp("trained") / "model")


def write_config(folder: Path, options: str = OPTIONS, **qwen) -> None:
    config = {
        "EXP": {"MODEL": "qwen"},
        "MODEL": {"QWEN": QWEN | qwen},
        "DATALOADER": {"ROBOVERSE": {"cfg_path": "img_libero_aug.yaml", "cfg_opts": options}},
    }
    (folder / "config.yaml").write_text(yaml.dump(config))  # tuples become !!python/tuple


def write_stats(folder: Path, name: str) -> Path:
    if name.endswith("json"):
        (folder / name).write_text(json.dumps({"out_ori_act": {"min": LOW, "max": HIGH}}))
    else:
        arrays = {"out_ori_act": {"min": np.array(LOW), "max": np.array(HIGH), "n": np.int64(3)}}
        (folder / name).write_bytes(pickle.dumps(arrays, protocol=4))
    return folder / name


@pytest.fixture
def original(trained, tmp_path) -> Path:
    run = tmp_path / "vla0"
    shutil.copytree(trained, run / "model_last")
    write_config(run)
    write_stats(run, "dataset_stats.pkl")
    return run


@pytest.fixture
def trl(trained, tmp_path) -> Path:
    run = tmp_path / "trl"
    shutil.copytree(trained, run / "final")
    write_stats(run, "dataset_stats.json")
    return run


def run_import(source: Path | str, out: Path, *options: str) -> VLA0Policy:
    main(["import", f"--from={source}", f"--out={out}", *options])
    return VLA0Policy.from_pretrained(out)


# ------------------------------------------------------------------ the other codes' inference, written again


class Valid(LogitsProcessor):
    """`count` integers 0..1000, spaces between them: on texts, where the package's grammar is on tokens."""

    def __init__(self, tokenizer, count: int, start: int) -> None:
        self.tokenizer, self.count, self.start = tokenizer, count, start
        self.ids = {c: tokenizer.encode(c)[0] for c in "0123456789 "}

    def allowed(self, text: str) -> list[int]:
        words = text.split(" ")
        more = [c for c in "0123456789" if words[-1] != "0" and int(words[-1] + c) <= 1000]
        if words[-1]:
            more += [" "] if len(words) < self.count else ["end"]
        return [self.ids.get(c, self.tokenizer.eos_token_id) for c in more]

    def __call__(self, input_ids, scores):
        allowed = self.allowed(self.tokenizer.decode(input_ids[0, self.start :]))
        mask = torch.full_like(scores, float("-inf"))
        mask[:, allowed] = 0
        return scores + mask


def tiled_picture(cameras: list[np.ndarray], antialias: bool) -> Image.Image:
    """Cameras uint8 (H, W, 3) → one picture of 224×448: the centre 7/8, resized if need be, side by side."""
    parts = []
    for pixels in cameras:
        side = int(pixels.shape[0] * 0.875)
        edge = (pixels.shape[0] - side) // 2
        part = torch.from_numpy(pixels)[edge : edge + side, edge : edge + side].permute(2, 0, 1)[None]
        if side != 224:
            scale = 255 if antialias else 1  # which of the codes resizes numbers in [0, 1]
            part = scale * torch.nn.functional.interpolate(
                part.float() / scale,
                size=(224, 224),
                mode="bilinear",
                align_corners=False,
                antialias=antialias,
            )
        parts.append(part[0].permute(1, 2, 0).numpy().astype(np.uint8))  # truncated
    return Image.fromarray(np.concatenate(parts, axis=1))


def reference_inputs(folder: Path, picture: Image.Image, add_vision_id: bool) -> BatchFeature:
    system = (
        "Analyze the input image and predict robot actions for the next 8 timesteps. Each action has 7 "
        "dimensions. Output a single sequence of 56 integers (0-1000 each), representing the 8 timesteps "
        "sequentially. Provide only space separated numbers. Nothing else."
    )
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": INSTRUCTION}],
        },
    ]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, add_vision_id=add_vision_id
    )
    return processor(text=[text], images=[picture], return_tensors="pt")


def reference_actions(folder: Path, inputs: BatchFeature) -> tuple[list[int], np.ndarray]:
    """Greedy integers, and actions (8, 7)."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    start = inputs["input_ids"].shape[1]
    ids = model.generate(
        **inputs, max_new_tokens=400, do_sample=False, repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id, logits_processor=[Valid(tokenizer, 56, start)],
    )  # fmt: skip
    integers = [int(word) for word in tokenizer.decode(ids[0, start:], skip_special_tokens=True).split()]
    low, high = np.array(LOW), np.array(HIGH)
    return integers, np.array(integers).reshape(8, 7) / 1000 * (high - low) + low


def observe(size: int = 256) -> tuple[list[np.ndarray], dict]:
    """The same two pictures as those codes get them, and as LeRobot gives them."""
    random = np.random.default_rng(0)
    cameras = [random.integers(256, size=(size, size, 3), dtype=np.uint8) for _ in range(2)]
    keys = ("observation.images.image", "observation.images.image2")
    batch = {k: torch.from_numpy(c).permute(2, 0, 1)[None] / 255 for k, c in zip(keys, cameras, strict=True)}
    return cameras, {**batch, "task": [INSTRUCTION]}


@pytest.mark.parametrize(
    ("form", "model_folder", "add_vision_id"), [("original", "model_last", True), ("trl", "final", False)]
)
def test_same_tokens_pixels_and_actions(form, model_folder, add_vision_id, request, tmp_path, capsys):
    from lerobot.policies.factory import make_pre_post_processors

    source = request.getfixturevalue(form)
    policy = run_import(source, tmp_path / "ours")
    shutil.move(source / model_folder, tmp_path / "theirs")  # nothing of it is needed any more
    preprocess, postprocess = make_pre_post_processors(policy.config, str(tmp_path / "ours"))
    assert f"Wrote {tmp_path}/ours" in capsys.readouterr().out

    cameras, batch = observe()
    batch = preprocess(batch)
    theirs = reference_inputs(
        tmp_path / "theirs", tiled_picture(cameras, antialias=form == "trl"), add_vision_id
    )
    ours = policy.examples.acting_inputs(policy.examples.check(batch))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-6)
    integers, actions = reference_actions(tmp_path / "theirs", theirs)
    chunk = policy.predict_action_chunk(batch)
    assert len(set(integers)) > 10
    assert chunk.flatten().tolist() == integers
    np.testing.assert_allclose(postprocess(chunk)[0].numpy(), actions, atol=1e-6)


@pytest.mark.parametrize("form", ["original", "trl"])
def test_resized_pixels(form, request, tmp_path):
    """Byte for byte; the wrong kind of resize differs by far more than rounding."""
    policy = run_import(request.getfixturevalue(form), tmp_path / "ours")
    cameras, batch = observe(size=360)
    ours = policy.examples.pictures(policy.examples.check(batch), None)[0, 0].permute(1, 2, 0).int()
    difference = {
        antialias: (ours - torch.from_numpy(np.asarray(tiled_picture(cameras, antialias)).astype(int)))
        .abs()
        .max()
        for antialias in (False, True)
    }
    right = form == "trl"
    assert difference[right] == 0 and difference[not right] > 20


def test_golden_tokens(qwen_processor, golden, tmp_path):
    """With the real tokenizer, a sample of the original's own training code, token for token."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": 151936, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 1,
        "fullatt_block_indexes": [0],
    }
    model = Qwen2_5_VLForConditionalGeneration(make_vlm_config(qwen_processor, text, vision)).bfloat16()
    run = tmp_path / "vla0"
    model.save_pretrained(run / "model_last")
    qwen_processor.save_pretrained(run / "model_last")
    write_config(run)
    statistics = json.loads(shared("golden/vla0_libero_action_stats.json").read_text())
    (run / "dataset_stats.pkl").write_bytes(pickle.dumps({"out_ori_act": statistics["out_ori_act"]}))
    policy = run_import(run, tmp_path / "ours")
    assert policy.model.dtype == torch.bfloat16
    bins = torch.tensor([int(word) for word in golden["action_text"].split()]).reshape(1, 8, 7)
    batch = policy.examples.chat.training_batch([golden["instruction"]], bins)
    assert batch["input_ids"][0].tolist() == golden["input_ids"]
    state = load_file(next((tmp_path / "ours").glob("policy_postprocessor_*.safetensors")))
    np.testing.assert_allclose(state["action.min"], statistics["out_ori_act"]["min"])
    np.testing.assert_allclose(state["action.max"], statistics["out_ori_act"]["max"])


def test_settings_of_the_config(trained, tmp_path):
    run = tmp_path / "robot"
    shutil.copytree(trained, run / "model_last")
    (run / "dataset_stats.pkl").write_bytes(pickle.dumps({"out_ori_act": {"min": [0, 0], "max": [1, 2]}}))
    options = OPTIONS.replace("0.875", "0.9").replace("224", "112").replace("'3p1','3p2'", "'wrist','top'")
    write_config(run, options, horizon=4, original_action_dim=2, num_bins_actions=500,
                 rgb_img_size=(112, 112), tiled_rgb_imgs=False, action_mask_aug_per=0.1)  # fmt: skip
    with pytest.raises(SystemExit, match=r"cameras \['wrist', 'top'\].*--cameras="):
        run_import(run, tmp_path / "ours")
    config = run_import(
        run / "model_last", tmp_path / "ours", "--cameras=[wrist, observation.images.top]"
    ).config
    assert (config.chunk_size, config.n_action_steps, config.num_bins) == (4, 4, 500)
    assert (config.image_size, config.crop_ratio, config.tile_images) == (112, 0.9, False)
    assert config.add_vision_id and not config.resize_antialias and config.action_mask_prob == 0.1
    assert config.crop_rounding == "even"
    assert config.camera_keys == ["wrist", "observation.images.top"]
    assert config.action_feature.shape == (2,)
    for option in ("--chunk_size=8", "--num_bins=1000", "--image_size=224", "--crop_ratio=0.5"):
        with pytest.raises(SystemExit, match=f"{option.split('=')[0]}=.* contradicts .*config.yaml"):
            run_import(run, tmp_path / "other", option, "--cameras=[a, b]")


def test_checkpoint_n_with_statistics_elsewhere(trl, tmp_path):
    (trl / "final").rename(trl / "checkpoint-9")
    shutil.copytree(trl / "checkpoint-9", trl / "checkpoint-10")
    (trl / "checkpoint-9/model.safetensors").write_bytes(b"broken: must not be read")
    (trl / "dataset_stats.json").rename(tmp_path / "stats.json")
    with pytest.raises(SystemExit, match=r"dataset_stats.pkl or dataset_stats.json is missing.*--stats="):
        run_import(trl, tmp_path / "ours")
    options = [f"--stats={tmp_path}/stats.json", "--chunk_size=5", "--crop_ratio=1", "--num_bins=255"]
    config = run_import(trl, tmp_path / "ours", *options).config
    assert (config.chunk_size, config.crop_ratio, config.resize_antialias) == (5, 1.0, True)
    assert (config.num_bins, config.crop_rounding, config.add_vision_id) == (255, "down", False)
    with pytest.raises(SystemExit, match="made for pictures of 100352 pixels, not for 1 cameras of 224×224"):
        run_import(trl, tmp_path / "other", *options, "--cameras=[observation.images.front]")


@pytest.mark.parametrize(
    ("names", "argument", "expected"),
    [
        (["model_final"], "", "model_final"),
        (["model_3", "model_10"], "", "model_10"),
        (["model_final", "model_3", "model_last"], "", "model_last"),
        (["model_final", "model_3"], "model_3.pth", "model_3"),
        (["model_final", "model_3"], "model_3", "model_3"),
    ],
)
def test_which_model_of_a_run(names, argument, expected, original, tmp_path, capsys):
    (original / "model_last").rename(original / expected)
    for name in set(names) - {expected}:
        shutil.copytree(original / expected, original / name)
        (original / name / "model.safetensors").write_bytes(b"broken: must not be read")
    (original / f"{expected}.pth").write_bytes(b"no weights in it")
    run_import(original / argument, tmp_path / "ours")
    assert f"Imported {expected} of NVlabs/vla0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the model's folder .*/model_99 is not there.*holds no weights"):
        run_import(original / "model_99.pth", tmp_path / "other")


def test_prompt_of_an_old_transformers_is_in_the_card(original, tmp_path, capsys):
    file = original / "model_last/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "4.51.3"}))
    assert not run_import(original, tmp_path / "ours").config.add_vision_id
    why = "add_vision_id=false: written with transformers 4.51.3; before 4.52 it dropped add_vision_id"
    assert why in capsys.readouterr().out
    card = (tmp_path / "ours/README.md").read_text()
    assert f"| imported from | a checkpoint of NVlabs/vla0. {why}" in card
    assert '| prompt | without "Picture 1: " before the picture (`add_vision_id=false`) |' in card
    assert run_import(original, tmp_path / "other", "--add_vision_id=true").config.add_vision_id
    with pytest.raises(SystemExit, match="--add_vision_id='often' is not allowed: .* true or false"):
        run_import(original, tmp_path / "third", "--add_vision_id=often")


def test_options_that_do_not_apply(trl, tmp_path):
    for option in ("--base=x", "--data_config=x.yaml"):
        with pytest.raises(SystemExit, match=f"{option.split('=')[0]}=.* does not apply"):
            run_import(trl, tmp_path / "ours", option)


def test_shards_old_names_and_a_copy_of_the_tied_head(trl, tmp_path):
    """As Transformers before 4.52 wrote them."""
    final = trl / "final"
    expected = run_import(trl, tmp_path / "expected")
    weights = load_file(final / "model.safetensors")
    renamed = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
        for k, v in weights.items()
    }
    renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"].clone()
    assert any(k.startswith("visual.") for k in renamed) and "model.norm.weight" in renamed
    (final / "model.safetensors").unlink()
    keys = sorted(renamed)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for file, own in shards.items():
        save_file({k: renamed[k] for k in own}, final / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: file for file, own in shards.items() for k in own}}
    (final / "model.safetensors.index.json").write_text(json.dumps(index))
    image_processor = {  # of Transformers 4
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 100352, "max_pixels": 100352,
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    }  # fmt: skip
    (final / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (final / "processor_config.json").unlink()
    found = run_import(trl, tmp_path / "found")
    pairs = zip(expected.named_parameters(), found.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)
    (final / "model-2.safetensors").unlink()
    with pytest.raises(SystemExit, match="model-2.safetensors is missing"):
        run_import(trl, tmp_path / "other")


@pytest.mark.parametrize(
    ("stored", "expected"), [([torch.bfloat16], "bfloat16"), ([torch.bfloat16, torch.float32], "float32")]
)
def test_type_of_the_weights_is_the_files(stored, expected, trl, tmp_path):
    """Not the one that config.json names; float32 if there are several."""
    assert json.loads((trl / "final/config.json").read_text())["dtype"] == "float32"
    weights = load_file(trl / "final/model.safetensors")
    weights = {key: value.to(stored[i % len(stored)]) for i, (key, value) in enumerate(weights.items())}
    save_file(weights, trl / "final/model.safetensors", {"format": "pt"})
    policy = run_import(trl, tmp_path / "ours")
    assert policy.config.dtype == expected
    assert {str(p.dtype) for p in policy.parameters()} == {f"torch.{expected}"}
    sums = [
        sum(value.double().sum() for value in values) for values in (weights.values(), policy.parameters())
    ]
    torch.testing.assert_close(*sums)


# ------------------------------------------------------------------------------------------------- bad input


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_does_not_run(protocol, original, tmp_path):
    stats = {"out_ori_act": {"min": LOW, "max": Malicious(tmp_path / "ran")}}
    (original / "dataset_stats.pkl").write_bytes(pickle.dumps(stats, protocol))
    with pytest.raises(SystemExit, match=r"no pickle of plain numbers .*it asks for posix.system"):
        run_import(original, tmp_path / "ours")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def damage_weights(run: Path, change) -> None:
    file = next(run.glob("*/model.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run / "final"), r"holds no model: .*\(found: dataset_stats.json\)"),
        (
            lambda run: (run / "final/model.safetensors").unlink(),
            "model.safetensors is missing. Weights are read",
        ),
        (
            lambda run: (run / "final/model.safetensors").write_bytes(
                (run / "final/model.safetensors").read_bytes()[:-9]
            ),
            "is truncated",
        ),
        (
            lambda run: (run / "final/adapter_config.json").write_text("{}"),
            "does not name the model that the adapter was trained on .*--base=",
        ),
        (
            lambda run: (run / "final/adapter_config.json").write_text('{"base_model_name_or_path": "gone"}'),
            "--base='gone' is neither a folder nor a Hub repo",
        ),
        (lambda run: (run / "final/config.json").write_text("{}"), "no config of a Transformers model"),
        (
            lambda run: (run / "final/config.json").write_text('{"type": "act"}'),
            "but of a LeRobot policy of type 'act'",
        ),
        (
            lambda run: (run / "config.yaml").write_text("horizon: 8"),
            "is no config of NVlabs/vla0's training",
        ),
        (lambda run: write_config(run, history=2), "MODEL.QWEN.history is 2; imported can be 1 only"),
        (lambda run: write_config(run, use_lora=True), "MODEL.QWEN.use_lora is True"),
        (lambda run: write_config(run, "IMAGE.img_size:224"), "does not say IMAGE.crop_img.*--crop_ratio"),
        (
            lambda run: write_config(run, original_action_dim=6),
            "of 7 action dimensions, but .* trained with 6",
        ),
        (
            lambda run: write_stats(run, "dataset_stats.json").rename(run / "dataset_stats.pkl"),
            "no pickle of",
        ),
        (
            lambda run: damage_weights(run, lambda w: w.pop("model.norm.weight")),
            "do not fit .*: model.language_model.norm.weight is missing",
        ),
        (
            lambda run: damage_weights(run, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
            r"model.norm.weight has shape \[3\] instead of \[64\]",
        ),
        (
            lambda run: damage_weights(run, lambda w: w.update({"action_head.weight": torch.ones(3)})),
            "action_head.weight is unknown",
        ),
        (
            lambda run: damage_weights(
                run, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})
            ),
            "lm_head.weight differs from the embeddings",
        ),
        (
            lambda run: damage_weights(run, lambda w: w.update({"model.norm.weight": torch.ones(64).byte()})),
            "model.norm.weight is of type U8",
        ),
    ],
)
def test_user_errors(change, message, trl, tmp_path):
    change(trl)
    with pytest.raises(SystemExit, match=f"(?s)lerobot-vla0 import: .*{message}"):
        run_import(trl, tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["trl"]


def test_pickle_without_config(original, tmp_path):
    (original / "config.yaml").unlink()
    with pytest.raises(SystemExit, match="has no config.yaml, which says how"):
        run_import(original, tmp_path / "ours")


def test_occupied_folder_and_unknown_source(trl, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="exists and is not empty"):
        run_import(trl, trl)
    with pytest.raises(SystemExit, match="--from='no such' is neither a folder nor a Hub repo"):
        run_import("no such", tmp_path / "ours")


def test_interrupted_import_leaves_nothing(trl, tmp_path, monkeypatch):
    def stop(*_, **__):
        assert list(tmp_path.glob(".ours-partial-*/ours/model.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "check_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        run_import(trl, tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["trl"]


# ---------------------------------------------------------------------------------------- what was exported


def export(folder: Path, out: Path) -> Path:
    main(["export", f"--policy.path={folder}", f"--out={out}"])
    return out


def contents(folder: Path) -> dict:
    """Path in the folder → what the file says. Left out: how it was trained."""
    found = {}
    for file in folder.rglob("*.*"):
        name = str(file.relative_to(folder))
        if file.suffix == ".json" and name != "train_config.json":
            found[name] = json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            found[name] = {key: (str(value.dtype), value.tolist()) for key, value in load_file(file).items()}
            # Embeddings and a head that is tied to them are stored once, under either name.
            heads = [k for k in found[name] if k.endswith(("embed_tokens.weight", "lm_head.weight"))]
            if len(heads) == 1:
                found[name]["tied"] = found[name].pop(heads[0])
    return found


def check_round_trip(folder: Path, tmp_path: Path) -> None:
    main(["import", f"--from={export(folder, tmp_path / 'plain')}", f"--out={tmp_path / 'back'}"])
    before, after = contents(folder), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name] == after[name], name
    again = export(tmp_path / "back", tmp_path / "again")
    assert (again / "action_spec.json").read_bytes() == (tmp_path / "plain/action_spec.json").read_bytes()


def test_import_undoes_export(learnt, tmp_path):
    folder, batch = learnt
    check_round_trip(folder, tmp_path)
    expected = VLA0Policy.from_pretrained(folder).predict_action_chunk(observation(batch))
    back = VLA0Policy.from_pretrained(tmp_path / "back")
    assert torch.equal(back.predict_action_chunk(observation(batch)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_import_undoes_export_of_other_families(family, tmp_path):
    settings = {**PICTURES[family], "chunk_size": 2, "n_action_steps": 2}
    config = make_config(make_tiny(family, tmp_path / "vlm"), 96, **settings)
    policy = VLA0Policy(config)
    randomise(policy)
    for part in (policy, *make_vla0_pre_post_processors(config, make_stats())):
        part.save_pretrained(tmp_path / "checkpoint")
    check_round_trip(tmp_path / "checkpoint", tmp_path)


def test_import_undoes_export_of_shards_and_statistics_by_task(learnt, tmp_path, monkeypatch):
    policy = VLA0Policy.from_pretrained(learnt[0])
    policy.config.action_norm, policy.config.dtype = "task", "bfloat16"
    policy.to(torch.bfloat16)
    stats = make_stats()
    stats |= {f"{PREFIX}open the drawer": {"min": torch.full((7,), -0.1), "max": torch.full((7,), 0.3)}}
    for part in (policy, *make_vla0_pre_post_processors(policy.config, stats)):
        part.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(export_module, "SHARD_BYTES", 100_000)
    check_round_trip(tmp_path / "checkpoint", tmp_path)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda spec: spec.update(spec_version=2), (), "spec_version 2, this package reads up to 1"),
        (lambda spec: spec.pop("checkpoint"), (), "action_spec.json is damaged: the field 'checkpoint'"),
        (lambda spec: None, ("--chunk_size=8",), "--chunk_size does not apply here"),
        (lambda spec: None, ("--cameras=[a]",), "--cameras does not apply here"),
    ],
)
def test_user_errors_with_what_was_exported(change, options, message, learnt, tmp_path):
    plain = export(learnt[0], tmp_path / "plain")
    spec = json.loads((plain / "action_spec.json").read_text())
    change(spec)
    (plain / "action_spec.json").write_text(json.dumps(spec))
    with pytest.raises(SystemExit, match=message):
        run_import(plain, tmp_path / "back", *options)
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize(
    ("files", "state", "named"),
    [
        *[
            ({name: {}}, {}, name)
            for name in (
                "../x.json", "/x.json", "..", ".", "", "run.py", "vlm/../../x.json", "vlm/x/y.json",
                "o/x.json", ".json", "vlm/.json", "x.json/", "a\0.json", "a\n.json", "..\\x.json", "ü.json",
                "x" * 300 + ".json",
            )
        ],
        *[
            ({}, {name: {}}, name)
            for name in ("../x", "..", ".", "", "/x", "policy_", "model.safetensors", "policy_a/b")
        ],
        *[
            ({}, {"policy_x.safetensors": {"a": {"dtype": dtype, "values": [1]}}}, dtype)
            for dtype in ("load", "__doc__", "float8", "complex64", "")
        ],
        ({}, {"policy_x.safetensors": {"a": {"dtype": "float32"}}}, "values"),
        ({}, {"policy_x.safetensors": {"a": {"dtype": 3, "values": [1]}}}, "wrong type"),
        ({}, {"policy_x.safetensors": [1]}, "wrong type"),
        ([], {}, "wrong type"),
    ],
)  # fmt: skip
def test_names_in_an_export(files, state, named, tmp_path):
    (tmp_path / "plain").mkdir()
    spec = {"spec_version": 1, "checkpoint": {"files": files, "state": state}}
    (tmp_path / "plain/action_spec.json").write_text(json.dumps(spec))
    with pytest.raises(SystemExit) as stop:
        main(["import", f"--from={tmp_path}/plain", f"--out={tmp_path}/deep/back"])
    message = str(stop.value)
    assert "action_spec.json" in message and repr(named)[1:-1][:190] in message
    assert sorted(p.name for p in tmp_path.rglob("*")) in (
        ["action_spec.json", "plain"],
        ["action_spec.json", "deep", "plain"],
    )


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "ABSOLUTE", "link.safetensors", "folder/m.safetensors", "..", "", 3, None]
)
def test_shards_elsewhere(name, tmp_path):
    """A file that is there and whole, but not in the folder of the index."""
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "m.safetensors")
    (folder / "folder").symlink_to(tmp_path)
    name = str(tmp_path / "m.safetensors") if name == "ABSOLUTE" else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="model.safetensors.index.json names .*which is no file in"):
        weights._stored_types(folder)


def test_shards_in_the_hubs_cache(tmp_path):
    """There, all files are links."""
    folder, blobs = tmp_path / "models--a--b/snapshots/1234", tmp_path / "models--a--b/blobs"
    for path in (folder, blobs):
        path.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, blobs / "m")
    (folder / "m.safetensors").symlink_to("../../blobs/m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    assert weights._stored_types(folder) == {"a": "F32"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x08", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
        *[
            len(header).to_bytes(8, "little") + header + bytes(16)
            for header in (
                b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
                b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,16]}}',
                b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
                b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
                b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
                b'{"a":{"dtype":"X","shape":[4],"data_offsets":[0,16]}}',
            )
        ],
    ],
)  # fmt: skip
def test_headers_that_promise_more_than_the_file_holds(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors is truncated or no safetensors"):
        weights._stored_types(tmp_path)
