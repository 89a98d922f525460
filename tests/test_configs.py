"""Each file in configs/ is a configuration of LeRobot's trainer, or of TRL's (sft_*.yaml)."""

import draccus
import pytest
from conftest import ROOT
from lerobot.configs.train import TrainPipelineConfig

from lerobot_vla0 import VLA0Config

SFT_FILES = sorted((ROOT / "configs").glob("sft_*.yaml"))
FILES = sorted({*(ROOT / "configs").glob("*.yaml")} - {*SFT_FILES})


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the output folder of a configuration must not exist yet
    monkeypatch.setattr("sys.argv", ["lerobot-train"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_parses(path):
    config = draccus.parse(TrainPipelineConfig, config_path=path, args=[])
    assert isinstance(config.policy, VLA0Config) and config.steps > 0
    config.validate()


@pytest.mark.parametrize("path", SFT_FILES, ids=lambda p: p.name)
def test_sft_parses(path):
    from lerobot_vla0.training.sft import SFTOptions

    options = draccus.parse(SFTOptions, config_path=path, args=[])
    training, gpus = options.trainer, 8 if path.name == "sft_libero.yaml" else 1
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 64
    assert options.dataset.repo_id == "lerobot/libero"
    assert options.policy.vlm == "Qwen/Qwen2.5-VL-3B-Instruct" and options.policy.dtype == "bfloat16"
    assert training.learning_rate == (4e-5 if options.peft is None else 4e-4)


@pytest.mark.parametrize(("name", "gpus"), [("train_libero", 8), ("train_libero_1gpu", 1)])
def test_libero_recipe_is_the_papers(name, gpus):
    config = draccus.parse(TrainPipelineConfig, config_path=ROOT / f"configs/{name}.yaml", args=[])
    assert (config.batch_size * gpus, config.policy.optimizer_lr) == (64, 4e-5)
    assert config.policy.vlm == "Qwen/Qwen2.5-VL-3B-Instruct" and config.policy.chunk_size == 8
