"""Adapters: what is trained, saved and loaded, and what is refused."""

import json
import logging
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_config
from lerobot.configs import PreTrainedConfig

from lerobot_vla0 import backbone
from lerobot_vla0.cli import main
from lerobot_vla0.demo.tiny_vlm import TinyVLMConfig, make_tiny_vlm
from lerobot_vla0.modeling_vla0 import VLA0Policy

LORA = {"method_type": "LORA", "r": 4, "lora_alpha": 8}


def logits(policy, batch: dict) -> torch.Tensor:
    policy.eval()
    # A PeftModel's `model` is the policy.
    policy = policy if isinstance(policy, VLA0Policy) else policy.get_base_model()
    with torch.no_grad():
        return policy.model(**policy.examples.training_examples(batch, None)[0]).logits


def save(policy, processors, folder: Path) -> Path:
    """As LeRobot's `save_checkpoint` does with PEFT."""
    policy.save_pretrained(folder)
    policy.config.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder


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


def test_users_can_choose_the_vision_encoder(tiny_vlm):
    policy = train_adapter(VLA0Policy(make_config(tiny_vlm)), target_modules=r".*visual.*\.qkv")
    assert all("visual" in name for name, p in policy.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 128}, "of in_features=256, which the base has with in_features=512"),
        ({"num_layers": 1}, r"a layer model.*layers\.1\..*does not have"),
    ],
)
def test_base_of_another_architecture(adapter, tmp_path, sizes, message):
    shutil.rmtree(tmp_path / "vlm")
    make_tiny_vlm(TinyVLMConfig(out=tmp_path / "vlm", **sizes))
    with pytest.raises(ValueError, match=f"(?s)does not fit its base.*{message}"):
        load(adapter)
    with pytest.raises(SystemExit, match="lerobot-vla0 merge: the adapter .* does not fit its base"):
        main(["merge", f"--policy.path={adapter}", f"--out={tmp_path}/merged"])


def test_base_is_gone(adapter, tmp_path):
    (tmp_path / "vlm").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match="base of the adapter .* is not there.*base_model_name_or_path"
    ):
        VLA0Policy.from_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert VLA0Policy.from_pretrained(adapter).config.vlm == str(tmp_path / "elsewhere")


def test_config_of_a_stranger(adapter):
    """LeRobot puts an adapter on after this package has loaded its base."""
    file = adapter / "adapter_config.json"
    good = json.loads(file.read_text())
    for changes, message in (
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; it must be 'LORA'"),
        ({"peft_type": "XLORA"}, "peft_type is 'XLORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "without megatron_config"),
        ({"r": 10**6}, "has layers of rank 1000000, and adapter_model.safetensors of 4 at most"),
        ({"rank_pattern": {"q_proj": 10**6}}, "has layers of rank 1000000"),
        ({"r": "4"}, "is damaged"),
        ({"rank_pattern": 3}, "is damaged"),
        ({"base_model_name_or_path": [1]}, "base_model_name_or_path is "),
        ({"revision": 3}, "revision is 3"),
    ):
        file.write_text(json.dumps(good | changes))
        config = PreTrainedConfig.from_pretrained(adapter)
        config.pretrained_path = adapter
        loads = [lambda: VLA0Policy.from_pretrained(adapter)]
        if "base" not in message:
            base = good["base_model_name_or_path"]
            loads.append(lambda c=config, b=base: VLA0Policy.from_pretrained(b, config=c))
        for load_it in loads:
            with pytest.raises(ValueError, match=f"{file}.*{message}"):
                load_it()


def test_head_is_refused(tiny_vlm):
    with pytest.raises(ValueError, match="includes lm_head"):
        VLA0Policy(make_config(tiny_vlm)).wrap_with_peft(
            peft_cli_overrides=LORA | {"target_modules": ["q_proj", "lm_head"]}
        )


def test_without_peft(adapter, tiny_vlm, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "lerobot_policy_vla0\[peft\]"'):
        VLA0Policy(make_config(tiny_vlm)).wrap_with_peft(peft_cli_overrides=LORA)
    with pytest.raises(ImportError, match=r'pip install "lerobot_policy_vla0\[peft\]"'):
        VLA0Policy.from_pretrained(adapter)


def test_four_bits_without_bitsandbytes(tiny_vlm, monkeypatch):
    monkeypatch.setattr(backbone, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r'needs bitsandbytes: pip install "lerobot_policy_vla0\[qlora\]"'):
        VLA0Policy(make_config(tiny_vlm, load_in_4bit=True))


def test_four_bits_of_a_checkpoint(policy, processors, tmp_path):
    save(policy, processors, tmp_path / "full")
    config = replace(policy.config, load_in_4bit=True)
    with pytest.raises(ValueError, match="load_in_4bit=True starts from a VLM"):
        VLA0Policy.from_pretrained(tmp_path / "full", config=config)


def test_adapter_on_four_bits(tiny_vlm, processors, tmp_path):
    """On the CPU, which bitsandbytes supports too."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    batch = processors[0](make_batch(rows=2))
    policy = VLA0Policy(make_config(tiny_vlm, load_in_4bit=True))
    blocks = policy.model.model
    assert isinstance(blocks.language_model.layers[0].mlp.up_proj, Linear4bit)
    assert type(policy.model.lm_head) is type(blocks.visual.blocks[0].attn.qkv) is torch.nn.Linear
    with pytest.raises(ValueError, match=r"load_in_4bit=True: .*--peft.method_type=LORA"):
        policy.get_optim_params()
    policy = policy.wrap_with_peft(peft_cli_overrides=LORA)
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=0.01)
    losses = []
    for _ in range(5):
        random.seed(0)
        loss, _ = policy(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    expected = logits(policy, batch)
    folder = save(policy, processors, tmp_path / "adapter")
    assert torch.equal(logits(load(folder), batch), expected)
    # Merged into the full weights, not into the rounded ones: close, not equal.
    main(["merge", f"--policy.path={folder}", f"--out={tmp_path}/merged"])
    merged = VLA0Policy.from_pretrained(tmp_path / "merged")
    assert type(merged.model.model.language_model.layers[0].mlp.up_proj) is torch.nn.Linear
    difference = (logits(merged, batch) - expected).abs().mean()
    assert 0 < difference < 0.3 * expected.abs().mean()
