import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from conftest import make_act, make_config, make_stats
from huggingface_hub import ModelCard
from lerobot.configs import FeatureType, PolicyFeature

from lerobot_vla0.cli import main
from lerobot_vla0.convert.card import make_card
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

TRAINING = {
    "dataset": {"repo_id": "lerobot/libero"},
    "steps": 80000,
    "batch_size": 8,
    "seed": 7,
    "optimizer": {"type": "adamw", "lr": 4e-5},
}


# What a card reads of a LeRobotDatasetMetadata.
DATASET_META = SimpleNamespace(
    repo_id="lerobot/libero", total_episodes=1693, total_frames=273465, fps=10, robot_type="panda",
    tasks=pd.DataFrame({"task_index": [0]}, index=["open the drawer"]),
)  # fmt: skip


def metadata(card: object) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


def test_card_of_the_published_recipe():
    config = make_config("Qwen/Qwen2.5-VL-3B-Instruct", image_size=224, repo_id="me/vla0", tags=["mine"])
    action_range = {"min": [-0.93751] * 7, "max": [0.9375] * 7}
    card = make_card(config, TRAINING, action_range, dataset_meta=DATASET_META)
    assert metadata(card) == {
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "base_model_relation": "finetune",
        "datasets": "lerobot/libero",
        "tags": ["lerobot", "mine", "robotics", "vision-language-action", "vla0"],
    }
    for words in [
        "# Model Card for vla0\n",
        "the next 8 actions as 56 integers from 0 to 1000",
        'Agent.from_pretrained("me/vla0")',
        "--policy.path=me/vla0",
        "`observation.images.image`, `observation.images.image2`",
        "[lerobot/libero](https://huggingface.co/datasets/lerobot/libero)",
        "- **Episodes:** 1693\n- **Frames:** 273465\n- **Frame rate:** 10 FPS",
        '- **Task(s):** "open the drawer"',
        "| Training steps | 80000 |\n| Batch size | 8 |\n| Optimizer | adamw |\n| Learning rate | 4e-05 |",
        "| base model | [Qwen/Qwen2.5-VL-3B-Instruct](https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct), ",
        "lerobot-train \\\n  --dataset.repo_id=${HF_USER}/<dataset> \\\n  --policy.type=vla0 ",
        "crop 0.875 (random in training), squash to 224×224 pixels, side by side",
        "up to 0.4 of the characters",
        "minimum and maximum of the data set's actions → 0..1000",
        "| action min | [-0.9375, ",
        "under the Qwen Research License, which binds",
    ]:
        assert words in str(card), words
    assert "lerobot_policy_vla0[peft]" not in str(card)


def test_what_is_not_the_default_is_said():
    """What whoever runs the policy has to know: how cameras become squares, and what the actions add to."""
    names = ["shoulder.pos", "elbow.pos", "Gripper.pos"]
    action = {"action": PolicyFeature(FeatureType.ACTION, (3,))}
    config = make_config(
        "vlm", image_fit="letterbox", empty_cameras=1, use_relative_actions=True, output_features=action,
        action_feature_names=names,
    )  # fmt: skip
    text, default = str(make_card(config, {}, {})), str(make_card(make_config("vlm"), {}, {}))
    for words, in_default in [
        ("letterbox to 56×56 pixels", False),
        ("squash to 56×56 pixels", True),
        ("0.05); 1 may be missing, and is black then |\n| prompt |", False),
        ("of the data set's relative actions (minus the state that is seen) → 0..1000", False),
        ("| not relative | Gripper.pos |", False),
        ("as uint8 images (H, W, 3) and the robot's state; `action`", False),
        ("of the data set's actions → 0..1000", True),
    ]:
        assert (words in text, words in default) == (not in_default, in_default), words
    config.relative_exclude_joints = []
    assert "| not relative | none |" in str(make_card(config, {}, {}))
    assert not [word for word in ("relative", "missing") if word in default.split("## How it was made")[1]]


@pytest.mark.parametrize(
    ("vlm", "licence"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "other"),
        ("someone/else", None),
    ],
)
def test_licence_is_the_base_models(vlm, licence):
    card = make_card(make_config(vlm), {}, {})
    assert metadata(card).get("license") == licence
    if licence is None:
        assert "is under the licence that it names" in str(card)
    card = make_card(make_config(vlm, license="mit"), {}, {})
    assert metadata(card)["license"] == "mit" and "These weights: mit." in str(card)


def test_nothing_of_this_machine(tmp_path):
    """Folders are named without where they lie; a run's own earlier checkpoint is no base model."""
    config = make_config(tmp_path / "vlm", pretrained_path=tmp_path / "run/last", use_peft=True)
    (tmp_path / "vlm").mkdir()
    card = make_card(
        config,
        {**TRAINING, "dataset": {"repo_id": "local/milk"}, "peft": {"method_type": "LORA", "r": 8}},
        {},
    )
    assert str(tmp_path) not in str(card) and "`vlm` (not on the Hub)" in str(card)
    assert "base_model" not in metadata(card) and "datasets" not in metadata(card)
    assert "| adapter | LORA, rank 8 |" in str(card) and "lerobot_policy_vla0[peft]" in str(card)
    config = make_config(tmp_path / "vlm", pretrained_path=Path("me/base"), use_peft=True)
    assert metadata(make_card(config, {}, {}))["base_model_relation"] == "adapter"
    assert metadata(make_card(config, {}, {}))["base_model"] == "me/base"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What the card is made from; the weights are not needed."""
    config = make_config("Qwen/Qwen2.5-VL-3B-Instruct")
    folder = tmp_path / "checkpoint"
    config.save_pretrained(folder)
    for processor in make_vla0_pre_post_processors(config, make_stats(-2.0, 3.0)):
        processor.save_pretrained(folder)
    (folder / "train_config.json").write_text(json.dumps(TRAINING))
    return folder


def write_results(folder: Path, stand_ins: bool, done: int = 4) -> Path:
    folder.mkdir()
    settings = {
        "stand_in_assets": stand_ins, "episodes_in_all": 4, "episodes": 2, "first_init_state": 0,
        "image_size": 256, "assets": ["primitive" if stand_ins else "real"] * 2,
        "policy": {"n_action_steps": 1, "ensemble_size": 8},
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    outcomes = [("libero_object", 3, True), ("libero_object", 3, False), ("libero_goal", 0, True),
                ("libero_goal", 1, True)][:done]  # fmt: skip
    rows = [
        {"suite": suite, "task_id": task, "task": "t", "episode": i, "success": success, "steps": 100}
        for i, (suite, task, success) in enumerate(outcomes)
    ]
    (folder / "episodes-1of1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_command_writes_then_renews_the_evaluation(checkpoint, tmp_path):
    main(["card", f"--policy.path={checkpoint}"])
    text = (checkpoint / "README.md").read_text()
    assert ModelCard(text).data.library_name == "lerobot"
    assert "None yet." in text and "| Training steps | 80000 |" in text and "| action max | [3.0, 3.0" in text

    (checkpoint / "README.md").write_text(text + "\nMy own words.\n")
    results = write_results(tmp_path / "stand_ins", stand_ins=True)
    main(["card", f"--policy.path={checkpoint}", f"--results={results}"])
    text = (checkpoint / "README.md").read_text()
    assert "**Measured on stand-in assets: these are not LIBERO scores.**" in text
    assert "| libero_object | 1 | 1/2 = 50.0 % | 9.5–90.5 % | 100 |" in text
    assert "| libero_goal | 2 | 2/2 = 100.0 %" in text and "| **all** |  | 3/4 = 75.0 %" in text
    assert "n_action_steps=1, ensemble_size=8, assets primitive." in text
    assert "My own words." in text and "None yet." not in text

    results = write_results(tmp_path / "real", stand_ins=False, done=3)
    main(["card", f"--policy.path={checkpoint}", f"--results={results}"])
    text = (checkpoint / "README.md").read_text()
    assert "stand-in" not in text and "Unfinished: 3 of 4 episodes." in text and "My own words." in text
    assert text.count("## Evaluation") == 1

    (checkpoint / "README.md").write_text("# Mine\n")
    main(["card", f"--policy.path={checkpoint}", f"--results={results}"])
    text = (checkpoint / "README.md").read_text()
    assert text.startswith("# Mine\n") and text.count("## Evaluation") == 1


def test_user_errors(checkpoint, tmp_path):
    empty = write_results(tmp_path / "empty", stand_ins=False, done=0)
    make_act(tmp_path / "act")
    for options, message in [
        ([], "the card of which checkpoint"),
        (["--policy.path=me/policy"], "is no folder. Download the checkpoint first"),
        ([f"--policy.path={tmp_path}/act"], "holds a 'act' policy, not vla0"),
        ([f"--policy.path={checkpoint}", "--results=nowhere"], "'nowhere' is no results folder"),
        ([f"--policy.path={checkpoint}", f"--results={empty}"], "holds no finished episode"),
    ]:
        with pytest.raises(SystemExit, match=f"lerobot-vla0 card: .*{message}"):
            main(["card", *options])
    assert not (checkpoint / "README.md").exists()
