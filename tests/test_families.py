"""Every family of VLMs through a policy's life: pictures and prompt, training, decoding, saving, LoRA."""

import logging
import shutil

import pytest
import torch
from conftest import make_batch, make_config, make_stats, observation, randomise, train_steps
from tiny_families import FAMILIES, PICTURES, make_tiny
from transformers import AutoProcessor

from lerobot_vla0 import vlm
from lerobot_vla0.decoding.engine import decode
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: make_tiny(family, root / family) for family in FAMILIES}


def config_of(family, folders, **overrides):
    settings = {**PICTURES[family], "chunk_size": 4, "n_action_steps": 4}
    return make_config(folders[family], 80, **{**settings, **overrides})


def make_policy(family, folders, **overrides):
    policy = VLA0Policy(config_of(family, folders, **overrides)).eval()
    randomise(policy, seed=3)
    if family == "gemma3":  # multiplies its embeddings by √hidden: the text would be all zeros
        policy.model.lm_head.weight.data /= 8
    return policy


def make_bins(rows=2, seed=0):
    """A batch behind the preprocessor, in pixels that need a resize."""
    batch = make_batch(rows, 80, seed, chunk_size=4)
    bins = ((batch["action"] + 1) / 2 * 1000).round().long()
    return {**batch, "action": bins}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_pixels_are_the_processors_own(family, folders):
    processor = AutoProcessor.from_pretrained(folders[family])
    policy = VLA0Policy(config_of(family, folders))
    batch = make_bins(1)
    ours = policy.examples.acting_inputs(policy.examples.check(batch))
    pictures = policy.examples.pictures(policy.examples.check(batch), None)[0]
    text = policy.examples.chat._render(policy.examples.chat.messages(batch["task"][0]), True)
    settings = {
        "smolvlm": {"do_image_splitting": False, "do_resize": False},
        "internvl": {"crop_to_patches": False},
        # Qwen's would enlarge small pictures up to a limit that other processors of the same process change.
        "qwen2_vl": {"do_resize": False},
        "qwen3_vl": {"do_resize": False},
    }
    theirs = processor(
        text=[text],
        images=[list(pictures)],
        images_kwargs=settings.get(family, {}),
        add_special_tokens=False,
        return_tensors="pt",
    )
    ids = theirs["input_ids"][0].tolist()
    assert ours["input_ids"][0].tolist() == ids + [policy.examples.chat.space_id] * (family == "smolvlm")
    # SmolVLM2's processor resizes with PIL and therefore normalises in NumPy.
    tolerance = 1e-6 if family == "smolvlm" else 0
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["qwen2_5_vl", *FAMILIES])
def test_parts_are_where_the_family_says(family, folders, tiny_vlm):
    """Of the model as Transformers makes it: layers by class name, as FSDP looks for them; and the processor
    leads to the same family."""
    folder = tiny_vlm if family == "qwen2_5_vl" else folders[family]
    model, processor = vlm.load_vlm(folder, revision=None, dtype="float32", attn_implementation=None)
    ours = vlm.family(model)
    assert ours is vlm.family(processor) is vlm.FAMILIES[family]
    text = vlm.language_model(model)
    blocks = [module for module in model.modules() if type(module).__name__ == vlm.block_name(model)]
    assert blocks == list(text.layers)
    assert set(map(id, model.parameters())) == {
        id(p) for part in (text, model.lm_head, *vlm.vision_modules(model)) for p in part.parameters()
    }


def test_processor_of_another_vlm_is_refused(folders):
    tokenizer = AutoProcessor.from_pretrained(folders["qwen2_vl"]).tokenizer
    with pytest.raises(ValueError, match=f"vlm: its processor is a .{type(tokenizer).__name__}.*qwen2_5_vl"):
        vlm.family(tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_decoding_are_those_of_a_full_pass(family, folders):
    """Two rows of different lengths, drafts of different lengths, rejected ones; against the model's own
    forward on the whole sequence."""
    policy = make_policy(family, folders)
    batch = make_bins(2)
    inputs = policy.examples.acting_inputs(policy.examples.check(batch))
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert lengths[0] != lengths[1]
    ids = policy.decoder.grammar.token_ids

    def full(row, answer, places):
        single = {key: value.chunk(2)[row] for key, value in inputs.items()}
        tokens = [*single["input_ids"][0, : lengths[row]].tolist(), *answer]
        single["input_ids"] = torch.tensor([tokens])
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in single:
                single[key] = (single["input_ids"] == policy.vlm_processor.image_token_id).int()
        return policy.model(**single).logits[0, -places:, ids]

    a, b, c = ids[3:6]
    with torch.inference_mode():
        model = policy.decoder.session(inputs)
        steps = [
            (model.start([[a, b, c], []]), [full(0, [a, b, c], 4), full(1, [], 1)]),
            (model.extend([1, 0], [[c, a], [b, b, a]]), [full(0, [a, c, a], 2), full(1, [b, b, a], 3)]),
            (model.extend([2, 1], [[b], []]), [full(0, [a, c, a, b], 1)]),
        ]
    for got, rows in steps:
        for row, expected in enumerate(rows):
            assert torch.allclose(torch.from_numpy(got[row, : len(expected)]), expected, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_loads(family, folders, tmp_path):
    """A few steps lower the loss; the checkpoint, moved away from its VLM, gives the same actions."""
    policy = VLA0Policy(
        config_of(family, folders, gradient_checkpointing=family == "smolvlm", freeze_vision=True)
    )
    frozen = [p for module in vlm.vision_modules(policy.model) for p in module.parameters()]
    assert frozen and not any(p.requires_grad for p in frozen)
    batch = make_bins(2)
    losses, metrics = train_steps(policy, batch, steps=6, lr=3e-3)
    assert losses[-1] < 0.9 * losses[0] and 0 <= metrics["token_accuracy"] <= 1
    policy.eval()
    actions = policy.predict_action_chunk(observation(batch))
    assert actions.shape == (2, 4, 7)
    policy.save_pretrained(tmp_path)
    for processor in make_vla0_pre_post_processors(policy.config, make_stats()):
        processor.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".json", ".safetensors")]
    policy.config.vlm = "somewhere/else"
    loaded = VLA0Policy.from_pretrained(tmp_path)
    assert torch.equal(loaded.predict_action_chunk(observation(batch)), actions)
    loaded.eval()
    with torch.no_grad():
        assert loaded.forward(batch)[0].item() == policy.forward(batch)[0].item()


@pytest.mark.parametrize("family", FAMILIES)
def test_acts_alone_as_in_a_batch(family, folders):
    """Rows do not depend on each other, drafts change nothing, and the text follows the picture."""
    policy = make_policy(family, folders)
    batch = observation(make_bins(2))
    both = policy.predict_action_chunk(batch)
    policy.reset()
    alone = policy.predict_action_chunk({k: v[1:] for k, v in batch.items()})
    assert torch.equal(alone[0], both[1])
    with torch.inference_mode():
        inputs = policy.examples.acting_inputs(policy.examples.check(batch))
        plain = decode(policy.decoder.session(inputs), policy.decoder.grammar, 2)
    assert torch.equal(torch.tensor(plain.integers).view(2, 4, 7).float(), both)
    other = {**batch, "observation.images.image2": 1 - batch["observation.images.image2"]}
    policy.reset()
    assert not torch.equal(policy.predict_action_chunk(other), both)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_model_acts_the_same(folders):
    batch = observation(make_bins())
    plain, compiled = (make_policy("qwen3_vl", folders, compile_model=c) for c in (False, True))
    for _ in range(2):
        assert torch.equal(compiled.predict_action_chunk(batch), plain.predict_action_chunk(batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family, folders, tmp_path):
    """LeRobot's way to an adapter: the language model's layers only, saved, folded in again."""
    pytest.importorskip("peft")
    policy = make_policy(family, folders)
    VLA0Policy(config_of(family, folders)).save_pretrained(tmp_path / "base")
    policy.save_pretrained(tmp_path / "base")
    policy.config.pretrained_path = tmp_path / "base"
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 4})
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all(f".{vlm.family(policy.model).text}.layers." in name for name in trained)
    batch = make_bins(2)
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        wrapped.forward(batch)[0].backward()
        optimizer.step()
    wrapped.eval()
    expected = policy.predict_action_chunk(observation(batch))
    wrapped.save_pretrained(tmp_path / "adapter")
    policy.config.use_peft = True
    policy.config.save_pretrained(tmp_path / "adapter")
    loaded = VLA0Policy.from_pretrained(tmp_path / "adapter")
    assert (loaded.predict_action_chunk(observation(batch)) - expected).abs().max() <= 1


def test_gemma3_says_that_it_falls_back(folders, caplog):
    with caplog.at_level(logging.WARNING):
        VLA0Policy(config_of("gemma3", folders))
        VLA0Policy(config_of("internvl", folders))
    lines = [r.getMessage() for r in caplog.records if "row by row" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("gemma3")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen3_vl", {"image_size": 56}, "image_size=56 does not fit this VLM's patches. Set it to 64"),
        ("internvl", {"image_size": 64}, "does not fit this VLM's patches"),
        ("gemma3", {"image_size": 64}, "image_size=64 does not fit this VLM's patches. Set it to 56"),
        ("internvl", {"tile_images": True}, "takes square pictures only. Set tile_images=false"),
    ],
)
def test_pictures_that_would_be_resized(family, settings, message, folders):
    with pytest.raises(ValueError, match=message):
        VLA0Policy(config_of(family, folders, **settings))


def test_smaller_cameras_are_enlarged_for_a_fixed_size_only(folders):
    small = make_batch(1, 48, chunk_size=4)
    policy = make_policy("gemma3", folders)
    assert policy.examples.pictures(policy.examples.check(small), None).shape == (1, 2, 3, 56, 56)
    with pytest.raises(ValueError, match="smaller than the"):
        make_policy("internvl", folders).examples.check(small)


def test_template_that_thinks_first(folders):
    from lerobot_vla0.chat import ChatFormatter

    processor = AutoProcessor.from_pretrained(folders["qwen3_vl"])
    opening = "'<|im_start|>assistant\n"
    processor.chat_template = processor.chat_template.replace(opening, opening + "<think>\n")
    settings = {"horizon": 1, "dim": 2, "num_bins": 10, "num_pictures": 1, "picture_size": (64, 64)}
    with pytest.raises(ValueError, match="thinks first is not supported"):
        ChatFormatter(processor, **settings, picture_mark="", picture_text="", add_vision_id=False)
