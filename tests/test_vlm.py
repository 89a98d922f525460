import ast
import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, make_tiny
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    Gemma3Config,
    Qwen2_5_VLConfig,
)

from lerobot_vla0 import vlm

SETTINGS = {"dtype": "float32", "attn_implementation": None}


@pytest.fixture(scope="module")
def loaded(tiny_vlm):
    return vlm.load_vlm(tiny_vlm, revision=None, **SETTINGS)


@pytest.mark.parametrize(("count", "height", "width"), [(1, 56, 112), (2, 84, 28)])
def test_pixels_are_transformers_to_the_bit(loaded, count, height, width):
    _, processor = loaded
    pictures = torch.randint(256, (3, count, 3, height, width), dtype=torch.uint8)
    ours = vlm.family(processor).vision_inputs(processor, pictures, torch.zeros(3, 4, dtype=torch.long))
    theirs = processor.image_processor(list(pictures.flatten(0, 1)), do_resize=False, return_tensors="pt")
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype


def test_saved_folder_is_json_only_and_rebuilds(loaded, tmp_path):
    model, processor = loaded
    folder = tmp_path / "vlm"
    vlm.save_vlm(model, processor, folder)
    assert {p.suffix for p in folder.iterdir()} == {".json"}
    assert json.loads((folder / "chat_template.json").read_text())["chat_template"] == processor.chat_template
    built, again = vlm.build_vlm(folder, dtype="bfloat16", attn_implementation="eager")
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (built, model)]
    assert shapes[0] == shapes[1]
    assert built.dtype == torch.bfloat16 and built.config._attn_implementation == "eager"
    assert built.lm_head.weight is built.model.language_model.embed_tokens.weight
    # Position embeddings stay in float32, and are there although nothing was initialised.
    for part in ("language_model.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"):
        ours, theirs = (m.model.get_buffer(part) for m in (built, model))
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.slow
def test_3b_shape_is_built_without_random_initialisation(tiny_vlm, tmp_path):
    """Building the real 3B shape is a matter of seconds and allocates, but does not fill, its 7.5 GB."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
        vision_config={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
        tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    AutoProcessor.from_pretrained(tiny_vlm).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    start = time.process_time()
    model, _ = vlm.build_vlm(tmp_path, dtype="bfloat16", attn_implementation=None)
    seconds = time.process_time() - start
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.75e9, rel=0.01)
    # Random initialisation takes minutes of CPU time: this bound tells the two apart, it measures nothing.
    assert seconds < 60


def test_gives_the_weights_of_the_folder(loaded, tiny_vlm):
    theirs = AutoModelForImageTextToText.from_pretrained(tiny_vlm)
    assert all(torch.equal(a, b) for a, b in zip(loaded[0].parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "is a 'bert' model. Supported are vision-language models.*qwen2_5_vl"),
        (Gemma3Config(text_config={"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
    ],
)
def test_models_that_are_refused(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        vlm.load_vlm(tmp_path, revision=None, **SETTINGS)


def test_flash_attention_falls_back_with_one_line(tiny_vlm, caplog):
    """None is installed here; the checkpoint keeps the setting for machines that have it."""
    with caplog.at_level(logging.WARNING):
        model, _ = vlm.load_vlm(
            tiny_vlm, revision=None, dtype="float32", attn_implementation="flash_attention_2"
        )
    assert model.config._attn_implementation == "sdpa"
    warnings = [r.getMessage() for r in caplog.records if "flash" in r.getMessage()]
    assert len(warnings) == 1 and "using sdpa" in warnings[0]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_head_is_tied_if_only_text_config_says_so(name, stored, tmp_path):
    """As Transformers 4.57 writes it; a head that is stored is the model's own."""
    folder = make_tiny(name, tmp_path / "vlm")
    saved = json.loads((folder / "config.json").read_text())
    assert saved.pop("tie_word_embeddings") is saved["text_config"]["tie_word_embeddings"] is True
    (folder / "config.json").write_text(json.dumps(saved))
    weights = load_file(folder / "model.safetensors")
    embeddings = next(key for key in weights if key.endswith("embed_tokens.weight"))
    if stored:
        weights["lm_head.weight"] = weights[embeddings] + 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model, processor = vlm.load_vlm(folder, revision=None, **SETTINGS)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is not stored
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight" if stored else embeddings])
    vlm.save_vlm(model, processor, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["tie_word_embeddings"] is saved["text_config"]["tie_word_embeddings"] is not stored
    built, _ = vlm.build_vlm(tmp_path / "saved", **SETTINGS)
    assert (built.lm_head.weight is built.get_input_embeddings().weight) is not stored


def test_top_level_decides_if_it_says_so(tiny_vlm, tmp_path):
    folder = shutil.copytree(tiny_vlm, tmp_path / "vlm")
    saved = json.loads((folder / "config.json").read_text())
    saved["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(saved))
    assert saved["text_config"]["tie_word_embeddings"] is True
    assert vlm.read_config(folder).tie_word_embeddings is False


# ------------------------------------------------------------------------------------------ code of strangers

# What names a class of the checkpoint's own code, by file.
NAMES = {
    "config.json": ("model_type",),
    "tokenizer_config.json": ("tokenizer_class", "processor_class"),
    "processor_config.json": ("processor_class",),
    "preprocessor_config.json": ("image_processor_type", "processor_class", "feature_extractor_type"),
    "generation_config.json": ("custom_generate",),
}


@pytest.mark.parametrize("name", NAMES)
def test_code_of_a_model_is_neither_run_nor_asked_for(name, tiny_vlm, tmp_path, monkeypatch):
    """`auto_map` everywhere in a file, and a y on standard input, which Transformers may ask for."""
    folder, called = shutil.copytree(tiny_vlm, tmp_path / "vlm"), tmp_path / "called"
    (folder / "evil.py").write_text(f"open({str(called)!r}, 'w')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(f"open({str(called)!r}, 'w')\n")
    original = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    autos = "AutoConfig AutoModelForImageTextToText AutoProcessor AutoImageProcessor AutoVideoProcessor"
    auto_map = dict.fromkeys(autos.split(" "), "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for with_name in (False, True):
        changes = {"auto_map": auto_map} | (dict.fromkeys(NAMES[name], "Evil") if with_name else {})
        saved = {k: v | changes if isinstance(v, dict) else v for k, v in original.items()} | changes
        (folder / name).write_text(json.dumps(saved))
        for load in (
            lambda: vlm.load_vlm(folder, revision=None, **SETTINGS),
            lambda: vlm.build_vlm(folder, **SETTINGS),
            lambda: vlm.load_processor(folder),
        ):
            try:
                load()
            except Exception as error:  # Transformers' own, that it cannot be loaded without its code
                assert with_name or "trust_remote_code" in str(error), error
    assert not called.exists()


def test_every_call_says_that_code_is_not_trusted():
    """Transformers asks at the terminal where it is not said."""
    calls = []
    for file in Path(vlm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                calls.append((file.name, node.lineno, said.get("trust_remote_code")))
    assert len(calls) >= 4 and {said for *_, said in calls} == {"False"}, calls


def test_shards_of_a_vlm_elsewhere(tiny_vlm, tmp_path):
    folder = shutil.copytree(tiny_vlm, tmp_path / "vlm")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weights = load_file(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere.safetensors', which is not in its folder"):
        vlm.load_vlm(folder, revision=None, **SETTINGS)
