"""Adapters: what is trained, saved and loaded, and what is refused."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_config
from lerobot.configs import PreTrainedConfig
from tiny_vlm import TinyVLMConfig, make_tiny_vlm

from lerobot_vla0.modeling_vla0 import VLA0Policy

LORA = {"method_type": "LORA", "r": 4, "lora_alpha": 8}


def logits(policy, batch: dict) -> torch.Tensor:
    policy = policy if isinstance(policy, VLA0Policy) else policy.get_base_model()  # of a PeftModel
    policy.eval()
    with torch.no_grad():
        return policy.model(**policy.examples.training_examples(batch, None)[0]).logits


def load(folder: Path):
    """As LeRobot's `make_policy` does with PEFT."""
    from peft import PeftConfig, PeftModel

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    assert config.use_peft
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    return PeftModel.from_pretrained(VLA0Policy.from_pretrained(base, config=config), folder)


def train_adapter(policy, **overrides):
    policy = policy.wrap_with_peft(peft_cli_overrides=LORA | overrides)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def save(policy, processors, folder: Path) -> Path:
    """As LeRobot's `save_checkpoint` does with PEFT."""
    for part in (policy, policy.config, *processors):
        part.save_pretrained(folder)
    return folder


def make_adapter(tiny_vlm, processors, folder: Path) -> Path:
    """Checkpoint of an adapter whose base is the VLM in `folder`."""
    vlm = shutil.copytree(tiny_vlm, folder / "vlm")
    return save(train_adapter(VLA0Policy(make_config(vlm))), processors, folder / "adapter")


@pytest.fixture
def adapter(tiny_vlm, processors, tmp_path) -> Path:
    return make_adapter(tiny_vlm, processors, tmp_path)


def test_only_the_language_models_adapters_are_trained(tiny_vlm, processors, caplog):
    batch = processors[0](make_batch(rows=2))
    policy = VLA0Policy(make_config(tiny_vlm, gradient_checkpointing=True))
    with caplog.at_level(logging.INFO):
        policy = policy.wrap_with_peft(peft_cli_overrides=LORA)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert all("language_model" in name and "lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * policy.get_base_model().model.config.text_config.num_hidden_layers
    count, total = (sum(p.numel() for p in group) for group in (trained.values(), policy.parameters()))
    assert caplog.text.count(f"PEFT trains {count:,} of {total:,} parameters") == 1
    policy.train()
    policy(batch)[0].backward()
    # B starts at zero, so A has no gradient yet.
    assert all(p.grad is not None and p.grad.any() == ("lora_B" in name) for name, p in trained.items())


def test_targets(tiny_vlm):
    policy = train_adapter(VLA0Policy(make_config(tiny_vlm)), target_modules=r".*visual.*\.qkv")
    assert all("visual" in name for name, p in policy.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="includes lm_head"):
        train_adapter(VLA0Policy(make_config(tiny_vlm)), target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 128}, "in_features of its layer .* is 256, in the base 512"),
        ({"num_layers": 1}, r"its layer model.*layers\.1\..* in the base None"),
    ],
)
def test_base_of_another_architecture(adapter, tmp_path, sizes, message):
    shutil.rmtree(tmp_path / "vlm")
    make_tiny_vlm(TinyVLMConfig(out=tmp_path / "vlm", **sizes))
    for loader in (load, VLA0Policy.from_pretrained):
        with pytest.raises(ValueError, match=f"does not fit its base.*{message}"):
            loader(adapter)


def test_base_is_gone(adapter, tmp_path):
    (tmp_path / "vlm").rename(tmp_path / "elsewhere")
    message = "base of the adapter .* is not there.*base_model_name_or_path"
    with pytest.raises(FileNotFoundError, match=message):
        VLA0Policy.from_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert VLA0Policy.from_pretrained(adapter).config.vlm == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("changes", [{"peft_type": "XLORA"}, {"megatron_config": {"a": 1}}])
def test_kinds_that_name_further_files(changes, adapter):
    file = adapter / "adapter_config.json"
    good = json.loads(file.read_text())
    config = PreTrainedConfig.from_pretrained(adapter)
    config.pretrained_path, base = adapter, good["base_model_name_or_path"]
    file.write_text(json.dumps(good | changes))
    for path, overrides in ((adapter, None), (base, config)):
        with pytest.raises(ValueError, match=f"{file}: peft_type must be 'LORA', without megatron_config"):
            VLA0Policy.from_pretrained(path, config=overrides)


def test_without_peft(adapter, tiny_vlm, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for action in (
        lambda: VLA0Policy(make_config(tiny_vlm)).wrap_with_peft(peft_cli_overrides=LORA),
        lambda: VLA0Policy.from_pretrained(adapter),
    ):
        with pytest.raises(ImportError, match=r'pip install "lerobot_policy_vla0\[peft\]"'):
            action()
