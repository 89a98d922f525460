"""Each file in configs/ is a configuration that LeRobot's trainer parses, or TRL's (sft_*.yaml), or TRL's own
script (trl_*.yaml)."""

import draccus
import pytest
from conftest import ROOT
from lerobot.configs.train import TrainPipelineConfig
from trl.scripts.sft import make_parser

from lerobot_vla0 import VLA0Config
from lerobot_vla0.training.sft_options import parse

SFT_FILES = sorted((ROOT / "configs").glob("sft_*.yaml"))
TRL_FILES = sorted((ROOT / "configs").glob("trl_*.yaml"))
FILES = sorted({*(ROOT / "configs").glob("*.yaml")} - {*SFT_FILES, *TRL_FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_parses(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the output folder of a configuration must not exist yet
    monkeypatch.setattr("sys.argv", ["lerobot-train"])
    config = draccus.parse(TrainPipelineConfig, config_path=path, args=[])
    assert isinstance(config.policy, VLA0Config) and config.steps > 0
    config.validate()


@pytest.mark.parametrize("path", SFT_FILES, ids=lambda p: p.name)
def test_sft_parses(path):
    arguments = parse(["--config", str(path), "--use_cpu", "--bf16=false"])
    training = arguments.training
    gpus = 8 if path.name == "sft_libero.yaml" else 1
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 64
    assert arguments.dataset.repo_id == "lerobot/libero"
    assert arguments.policy.vlm == "Qwen/Qwen2.5-VL-3B-Instruct" and arguments.policy.dtype == "bfloat16"
    assert training.learning_rate == (4e-4 if arguments.options.use_lora else 4e-5)


@pytest.mark.parametrize("path", TRL_FILES, ids=lambda p: p.name)
def test_trl_parses(path):
    script, training, model, _ = make_parser().parse_args_and_config(["--config", str(path)])
    assert training.max_steps > 0 and training.use_cpu and not training.bf16
    assert model.model_name_or_path.startswith("outputs/") and script.dataset_name.startswith("outputs/")


@pytest.mark.parametrize(("name", "gpus"), [("train_libero", 8), ("train_libero_1gpu", 1)])
def test_libero_recipe_is_the_papers(name, gpus):
    config = draccus.parse(TrainPipelineConfig, config_path=ROOT / f"configs/{name}.yaml", args=[])
    assert (config.batch_size * gpus, config.policy.optimizer_lr) == (64, 4e-5)
    assert config.policy.vlm == "Qwen/Qwen2.5-VL-3B-Instruct" and config.policy.chunk_size == 8
