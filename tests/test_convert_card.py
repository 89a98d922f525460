import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from conftest import make_config, make_stats

from lerobot_vla0.cli import main
from lerobot_vla0.convert.card import make_card
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

TRAINING = {
    "dataset": {"repo_id": "lerobot/libero"},
    "steps": 80000,
    "batch_size": 8,
    "optimizer": {"lr": 4e-5},
}
# The part of a LeRobotDatasetMetadata that a card reads.
META = SimpleNamespace(
    total_episodes=1693,
    total_frames=273465,
    tasks=pd.DataFrame({"task_index": [0]}, index=["open the drawer"]),
)


def metadata(card: object) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


def test_card_of_the_published_recipe():
    config = make_config("Qwen/Qwen2.5-VL-3B-Instruct", image_size=224, repo_id="me/vla0", tags=["mine"])
    card = make_card(config, TRAINING, META)
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
        "the next 8 actions as 56 integers from 0 to 1000.",
        'Agent.from_pretrained("me/vla0")',
        "`observation.images.image`, `observation.images.image2`",
        "[lerobot/libero](https://huggingface.co/datasets/lerobot/libero)",
        "| Training steps | 80000 |\n| Batch size | 8 |\n| Learning rate | 4e-05 |\n| `dtype` | float32 |\n",
        "| `crop_ratio` | 0.875 |",
        "- **Episodes:** 1693\n- **Frames:** 273465\n- **Tasks:** open the drawer",
    ]:
        assert words in str(card), words
    assert "lerobot_policy_vla0[peft]" not in str(card)


def test_nothing_of_this_machine(tmp_path):
    """Folders are named without their paths; a run's own earlier checkpoint is no base model."""
    (tmp_path / "vlm").mkdir()
    config = make_config(tmp_path / "vlm", pretrained_path=tmp_path / "run/last", use_peft=True)
    card = make_card(config, {**TRAINING, "dataset": {"repo_id": "local/milk"}})
    assert str(tmp_path) not in str(card) and "| Base model | `vlm`" in str(card)
    assert not {"base_model", "datasets", "license"} & metadata(card).keys()
    assert "lerobot_policy_vla0[peft]" in str(card)
    config = make_config(tmp_path / "vlm", pretrained_path=Path("me/base"), use_peft=True, license="mit")
    found = metadata(make_card(config, {}))
    assert (found["base_model"], found["base_model_relation"], found["license"]) == (
        "me/base",
        "adapter",
        "mit",
    )


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What the card is made from; the weights are not needed."""
    config, folder = make_config("Qwen/Qwen2.5-VL-3B-Instruct"), tmp_path / "checkpoint"
    for part in (config, *make_vla0_pre_post_processors(config, make_stats())):
        part.save_pretrained(folder)
    (folder / "train_config.json").write_text(json.dumps(TRAINING))
    return folder


def write_results(folder: Path, outcomes: list[tuple[str, int, bool]], stand_ins: bool = False) -> Path:
    folder.mkdir()
    policy = {"n_action_steps": 1, "ensemble_size": 8}
    settings = {"stand_in_assets": stand_ins, "episodes_in_all": 4, "policy": policy}
    (folder / "settings.json").write_text(json.dumps(settings))
    rows = [
        {"suite": suite, "task_id": task, "task": "t", "episode": i, "success": success, "steps": 100}
        for i, (suite, task, success) in enumerate(outcomes)
    ]
    (folder / "episodes-1of1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_command_writes_then_renews_the_evaluation(checkpoint, tmp_path):
    file = checkpoint / "README.md"
    main(["card", f"--policy.path={checkpoint}"])
    assert "None yet" in file.read_text() and "| Training steps | 80000 |" in file.read_text()
    file.write_text(file.read_text() + "\nMy own words.\n")
    outcomes = [("libero_object", 3, True), ("libero_object", 3, False), ("libero_goal", 0, True)]
    for name, stand_ins in (("stand_ins", True), ("real", False)):
        results = write_results(tmp_path / name, outcomes, stand_ins)
        main(["card", f"--policy.path={checkpoint}", f"--results={results}"])
        text = file.read_text()
        assert (
            "| libero_object | 1 | 1/2 = 50.0 % | 9.5–90.5 % | 100 |" in text
            and "| libero_goal | 1 | 1/1" in text
        )
        assert "3 of 4 episodes, n_action_steps=1, ensemble_size=8." in text
        assert ("**Stand-in assets: these are not LIBERO scores.**" in text) == stand_ins
        assert "My own words." in text and "None yet" not in text and text.count("## Evaluation") == 1
    file.write_text("# Mine\n")
    main(["card", f"--policy.path={checkpoint}", f"--results={results}"])
    assert file.read_text().startswith("# Mine\n") and file.read_text().count("## Evaluation") == 1
    empty = write_results(tmp_path / "empty", [])
    with pytest.raises(SystemExit, match="lerobot-vla0 card: .*holds no finished episode"):
        main(["card", f"--policy.path={checkpoint}", f"--results={empty}"])
