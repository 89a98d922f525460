import pytest
import torch
from conftest import make_batch, make_config, randomise
from peft import LoraConfig
from tiny_families import FAMILIES, PICTURES, make_tiny
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lerobot_vla0 import backbone, modeling_vla0
from lerobot_vla0.modeling_vla0 import VLA0Policy


def make_policy(vlm, family: str = "qwen2_5_vl", **overrides) -> VLA0Policy:
    settings = {**PICTURES.get(family, {}), "chunk_size": 4, "n_action_steps": 4, **overrides}
    policy = VLA0Policy(make_config(vlm, 80, **settings))
    randomise(policy)
    return policy.train()


def make_bins(rows: int = 3) -> dict:
    """A batch behind the preprocessor; its instructions have different lengths."""
    batch = make_batch(rows, 80, chunk_size=4)
    return {**batch, "action": ((batch["action"] + 1) * 500).round().long()}


def make_examples(policy, rows: int = 3):
    return policy.examples.training_examples(make_bins(rows), torch.Generator().manual_seed(0))


def step(policy, examples, monkeypatch, share: bool):
    """(losses, gradients, tokens that the language model saw)."""
    seen = []
    text = backbone.language_model(policy.model)
    counter = text.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel()))
    policy.zero_grad()
    with monkeypatch.context() as context:
        if not share:
            context.setattr(modeling_vla0, "can_share_words", lambda model, config: False)
        losses, _ = policy.example_loss(*examples, reduction="none")
    losses.sum().backward()
    counter.remove()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return losses.detach(), gradients, sum(seen)


def check_same(policy, monkeypatch):
    examples = make_examples(policy)
    losses, gradients, tokens = step(policy, examples, monkeypatch, share=False)
    shared_losses, shared_gradients, fewer = step(policy, examples, monkeypatch, share=True)
    torch.testing.assert_close(shared_losses, losses, rtol=1e-5, atol=0)
    assert shared_gradients.keys() == gradients.keys() and gradients
    sizes = {name: gradient.abs().max().item() for name, gradient in gradients.items()}
    rounding = 1e-7 * max(sizes.values())  # of gradients that are zero, as of a bias of all keys
    for name, gradient in gradients.items():
        atol = 1e-4 * sizes[name] + rounding
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=0, atol=atol, msg=name)
    assert fewer == tokens - 2 * policy.examples.chat.num_shared


@pytest.mark.parametrize("family", ["qwen2_5_vl", *(name for name in FAMILIES if name != "gemma3")])
def test_same_losses_and_gradients_with_fewer_tokens(family, tiny_vlm, tmp_path, monkeypatch):
    folder = tiny_vlm if family == "qwen2_5_vl" else make_tiny(family, tmp_path / "vlm")
    check_same(make_policy(folder, family), monkeypatch)


@pytest.mark.parametrize("settings", [{"attn_implementation": "eager"}, {"freeze_vision": True}])
def test_settings(settings, tiny_vlm, monkeypatch):
    check_same(make_policy(tiny_vlm, **settings), monkeypatch)


def test_adapter(tiny_vlm, monkeypatch):
    policy = make_policy(tiny_vlm)
    policy.wrap_with_peft(LoraConfig(r=4, init_lora_weights=False, target_modules=r".*layers\.\d+\..*_proj"))
    assert 0 < sum(p.requires_grad for p in policy.parameters()) < len(list(policy.parameters()))
    check_same(policy, monkeypatch)


def test_data_parallel(tiny_vlm, tmp_path):
    """Parameters that are used twice in a pass get one gradient, as LeRobot's trainer wraps the policy."""
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        policy = make_policy(tiny_vlm).eval()  # without augmentation, which draws from the global seed
        losses = []
        for wrapped in (policy, DistributedDataParallel(policy, find_unused_parameters=True)):
            policy.zero_grad()
            loss, _ = wrapped(make_bins())
            loss.backward()
            losses.append([loss.detach(), *(p.grad.clone() for p in policy.parameters())])
        torch.testing.assert_close(losses[0], losses[1])
    finally:
        torch.distributed.destroy_process_group()


def test_one_row_is_fed_whole(tiny_vlm, monkeypatch):
    policy = make_policy(tiny_vlm)
    examples = make_examples(policy, rows=1)
    assert step(policy, examples, monkeypatch, share=True)[2] == examples[1].numel()


def flash(policy):
    policy.model.model.language_model.config._attn_implementation = "flash_attention_2"


def shard(policy):
    """As `fully_shard` does."""
    layer = policy.model.model.language_model.layers[0]
    layer.__class__ = type("Sharded", (FSDPModule, type(layer)), {})


@pytest.mark.parametrize(
    ("settings", "change"),
    [({"gradient_checkpointing": True}, None), ({"compile_model": True}, None), ({}, flash), ({}, shard)],
)
def test_not_shared(settings, change, tiny_vlm):
    policy = make_policy(tiny_vlm, **settings)
    if change is not None:
        change(policy)
    assert not modeling_vla0.can_share_words(policy.model, policy.config)
    assert modeling_vla0.can_share_words(make_policy(tiny_vlm).model, make_config(tiny_vlm))


def test_attention_of_another_kind_is_not_shared(tmp_path, monkeypatch):
    policy = make_policy(make_tiny("gemma3", tmp_path / "vlm"), "gemma3")
    examples = make_examples(policy)
    assert step(policy, examples, monkeypatch, share=True)[2] == examples[1].numel()
