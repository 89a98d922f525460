import json
import re

import pytest
import torch
from conftest import make_batch, make_config, make_stats, observation, randomise
from safetensors.torch import load_file
from tiny_families import FAMILIES, PICTURES, make_tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from lerobot_vla0.cli import main
from lerobot_vla0.convert.export import ACTION_SPEC
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors


def run_export(folder, out):
    main(["export", f"--policy.path={folder}", f"--out={out}"])
    return out


@pytest.fixture(scope="module")
def exported(learnt, tmp_path_factory):
    return run_export(learnt[0], tmp_path_factory.mktemp("export") / "plain")


def ask(out, pictures, instruction):
    """As any user of Transformers would: the chat of the spec, the processor's defaults, `generate`."""
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    spec = json.loads((out / ACTION_SPEC).read_text())
    messages = spec["messages"]
    messages[1]["content"][-1]["text"] = instruction
    images = iter(pictures)
    for part in messages[1]["content"]:
        if part["type"] == "image":
            part["image"] = next(images)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=spec["max_tokens"])
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return inputs, processor.decode(new, skip_special_tokens=True), spec


def test_transformers_alone_writes_the_same_actions(learnt, exported):
    folder, batch = learnt
    policy = VLA0Policy.from_pretrained(folder)
    expected = policy.predict_action_chunk(observation(batch))
    first = policy.examples.check(observation(batch, slice(1)))
    ours = policy.examples.acting_inputs(first)
    inputs, text, spec = ask(exported, policy.examples.pictures(first, None)[0], batch["task"][0])
    assert torch.equal(inputs["input_ids"], ours["input_ids"])
    assert torch.equal(inputs["pixel_values"], ours["pixel_values"])
    assert [int(v) for v in text.split()] == expected[0].flatten().tolist()
    assert re.fullmatch(spec["regex"], text) and not re.fullmatch(spec["regex"], text + " 1")


def test_spec_is_what_a_client_needs(exported):
    spec = json.loads((exported / ACTION_SPEC).read_text())
    assert (spec["chunk_size"], spec["action_dim"], spec["num_bins"]) == (2, 7, 1000)
    assert spec["statistics"]["action"]["min"] == [-2.0] * 7 and spec["normalization"] == "MIN_MAX"
    assert spec["cameras"] == ["observation.images.image", "observation.images.image2"]
    assert spec["pictures"] == {"count": 1, "size": [56, 112]}
    assert (spec["crop_ratio"], spec["tile_images"], spec["picture_rule"]) == (1.0, True, "vla0-trl")
    assert (exported / ACTION_SPEC).stat().st_size < 5000


def test_training_from_an_export_has_its_own_setting(learnt, exported, tmp_path, caplog):
    """add_vision_id, of which an exported chat template knows the value. Transformers warns, once for each
    prompt, if it is given what a template does not ask for."""
    assert "{% set add_vision_id" in (exported / "chat_template.jinja").read_text()
    exported_value = VLA0Policy.from_pretrained(learnt[0]).config.add_vision_id
    for value in (exported_value, not exported_value):
        caplog.clear()
        policy = VLA0Policy(make_config(exported, add_vision_id=value))
        text = policy.examples.chat.tokenizer.decode(policy.examples.chat.prompt_ids("open the drawer"))
        assert ("Picture 1: " in text) == value
        assert "processor_kwargs" not in caplog.text
    policy.save_pretrained(tmp_path / "policy")
    make_vla0_pre_post_processors(policy.config, make_stats())[0].save_pretrained(tmp_path / "policy")
    again = run_export(tmp_path / "policy", tmp_path / "again")
    assert (again / "chat_template.jinja").read_text().count("{% set add_vision_id") == 1


def test_generation_is_neutral_and_weights_are_plain(learnt, exported):
    generation = GenerationConfig.from_pretrained(exported)
    assert not generation.do_sample and generation.repetition_penalty in (None, 1.0)
    policy = VLA0Policy.from_pretrained(learnt[0])
    assert generation.eos_token_id == policy.examples.chat.end_id
    stored = load_file(exported / "model.safetensors")
    assert set(stored) == set(dict(policy.model.named_parameters())) - {"lm_head.weight"}
    assert (exported / "preprocessor_config.json").is_file() and (exported / "chat_template.jinja").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_have_the_same_prompt_and_pixels(family, tmp_path):
    settings = {**PICTURES[family], "chunk_size": 2, "n_action_steps": 2, "crop_ratio": 1.0}
    policy = VLA0Policy(make_config(make_tiny(family, tmp_path / "vlm"), 96, **settings)).eval()
    randomise(policy)
    folder, out, back = tmp_path / "checkpoint", tmp_path / "out", tmp_path / "back"
    for part in (policy, *make_vla0_pre_post_processors(policy.config, make_stats())):
        part.save_pretrained(folder)
    batch = observation(make_batch(1, 96, chunk_size=2))
    checked = policy.examples.check(batch)
    pictures = policy.examples.pictures(checked, None)[0]
    inputs, _, _ = ask(run_export(folder, out), pictures, batch["task"][0])
    ours = policy.examples.acting_inputs(checked)
    assert torch.equal(inputs["input_ids"], ours["input_ids"])
    assert torch.allclose(inputs["pixel_values"], ours["pixel_values"], rtol=0, atol=1e-6)
    main(["import", f"--from={out}", f"--out={back}"])
    weights = VLA0Policy.from_pretrained(back).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
    for file in ("config.json", "policy_preprocessor.json", "vlm/config.json", "vlm/tokenizer.json"):
        assert (back / file).read_bytes() == (folder / file).read_bytes()


def test_user_errors(learnt, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit, match="export: out=.*exists and is not empty"):
        run_export(learnt[0], tmp_path / "full")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "config.json").write_bytes((learnt[0] / "config.json").read_bytes())
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="peft_type must be 'LORA'"):
        run_export(adapter, tmp_path / "out")
