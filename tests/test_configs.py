"""Each file in configs/ is a configuration that LeRobot's trainer parses."""

import draccus
import pytest
from conftest import ROOT
from lerobot.configs.train import TrainPipelineConfig

from lerobot_vla0 import VLA0Config

FILES = sorted((ROOT / "configs").glob("*train*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_parses(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the output folder of a configuration must not exist yet
    monkeypatch.setattr("sys.argv", ["lerobot-train"])
    config = draccus.parse(TrainPipelineConfig, config_path=path, args=[])
    assert isinstance(config.policy, VLA0Config) and config.steps > 0
    config.validate()


def test_libero_recipe_is_the_papers():
    config = draccus.parse(TrainPipelineConfig, config_path=ROOT / "configs/train_libero.yaml", args=[])
    assert (config.batch_size * 8, config.policy.optimizer_lr) == (64, 4e-5)
    assert config.policy.vlm == "Qwen/Qwen2.5-VL-3B-Instruct" and config.policy.chunk_size == 8
