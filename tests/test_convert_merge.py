"""`lerobot-vla0 merge`: an adapter becomes a full checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import make_batch, make_config, observation, randomise
from test_adapters import load, logits, make_adapter, save, train_adapter

from lerobot_vla0.agent import Agent
from lerobot_vla0.cli import main
from lerobot_vla0.modeling_vla0 import VLA0Policy


@pytest.mark.parametrize("of_a_checkpoint", [False, True])
def test_logits_before_save_after_load_and_after_merge(of_a_checkpoint, tiny_vlm, processors, tmp_path):
    batch = processors[0](make_batch(rows=2))
    config = make_config(tiny_vlm)
    policy = VLA0Policy(config)
    if of_a_checkpoint:
        randomise(policy)
        policy.save_pretrained(tmp_path / "base")
        config = replace(config, vlm="gone", pretrained_path=tmp_path / "base")
        policy = VLA0Policy.from_pretrained(tmp_path / "base", config=config)
    without = logits(policy, batch)
    policy = train_adapter(policy)
    expected = logits(policy, batch)
    assert (expected - without).abs().max() > 0.1
    folder = save(policy, processors, tmp_path / "adapter")
    assert not (folder / "model.safetensors").exists()
    loaded = load(folder)
    assert torch.equal(logits(loaded, batch), expected)
    main(["merge", f"--policy.path={folder}", f"--out={tmp_path}/merged"])
    assert json.loads((tmp_path / "merged/config.json").read_text())["use_peft"] is False
    merged = VLA0Policy.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-4)
    observed = observation(batch)
    chunk = merged.predict_action_chunk(observed)
    assert torch.equal(loaded.predict_action_chunk(observed), chunk)
    assert torch.equal(loaded.select_action(observed), chunk[:, 0])
    assert torch.equal(VLA0Policy.from_pretrained(folder).predict_action_chunk(observed), chunk)


def test_merged_in_bfloat16_and_used_by_an_agent(tiny_vlm, processors, tmp_path):
    """Without the base. bfloat16 rounds the sum of weights and adapter once more."""
    adapter = make_adapter(tiny_vlm, processors, tmp_path)
    main(["merge", f"--policy.path={adapter}", f"--out={tmp_path}/merged", "--policy.dtype=bfloat16"])
    shutil.rmtree(tmp_path / "vlm")
    shutil.rmtree(adapter)
    agent = Agent.from_pretrained(tmp_path / "merged")
    assert agent.policy.model.dtype == torch.bfloat16
    image = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    assert agent.act({"pixels": {"image": image, "image2": image}}, "open the drawer").shape == (7,)


def test_nothing_to_merge(policy, processors, tmp_path):
    save(policy, processors, tmp_path / "full")
    with pytest.raises(SystemExit, match="which adapter"):
        main(["merge", f"--out={tmp_path}/merged"])
    with pytest.raises(SystemExit, match="is no adapter .*nothing to merge"):
        main(["merge", f"--out={tmp_path}/merged", f"--policy.path={tmp_path}/full"])
