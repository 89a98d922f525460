"""What other implementations of VLA-0 write is imported as it is, and the model is shown what their own code
shows it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import shared
from peers import make_run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from lerobot_vla0 import backbone
from lerobot_vla0.cli import main
from lerobot_vla0.examples import Observation
from lerobot_vla0.modeling_vla0 import VLA0Policy

MODELS = {
    "nvlabs_transformers_4_51": "model_last",
    "nvlabs_transformers_4_57": "model_last",
    "vla0_trl": "final",
    "vla0_trl_sharded": "final",
    "tinyvla": "final",
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Name of a run → (its folder, its import); each is made once."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            run = make_run(name, folder / "run", MODELS[name])
            main(["import", f"--from={run}", f"--out={folder / 'ours'}"])
            made[name] = run, folder / "ours"
        return made[name]

    return get


def cases(name: str) -> list[dict]:
    return json.loads((shared("peer_layouts") / name / "acting/cases.json").read_text())


def pixels(file) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_pictures_are_theirs_to_the_byte(name, imported):
    examples = VLA0Policy.from_pretrained(imported(name)[1]).examples
    acting = name.removesuffix("_sharded")
    # TinyVLA's prompt for acting lacks a clause of the one that it trains with, which is vla0-trl's.
    prompts = {case["task"]: case["input_ids"] for case in cases(acting.replace("tinyvla", "vla0_trl"))}
    sizes = set()
    for case in cases(acting):
        task, number = case["task"], case["case"]
        folder = shared("peer_layouts")
        cameras = [pixels(folder / f"camera_case{number}_{i}.png")[None] / 255 for i in (0, 1)]
        sizes.add(tuple(cameras[0].shape[-2:]))
        picture = examples.pictures(Observation(cameras, [task], None, None), None)
        assert torch.equal(picture[0, 0], pixels(folder / f"{acting}/acting/case{number}_picture.png")), case
        assert examples.chat.inference_batch([task])["input_ids"][0].tolist() == prompts[task]
    assert {(224, 224), (256, 256)} <= sizes and ("4_57" in name or (600, 600) in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvlabs_transformers_4_51", "nvlabs_transformers_4_57", "vla0_trl_sharded"])
def test_head_is_tied_everywhere(name, imported, tmp_path):
    """In the import, in a fresh policy on the folder, in the export, and in what is imported of that."""
    run, ours = imported(name)
    weights = {}
    for file in (run / MODELS[name]).glob("*.safetensors"):
        weights |= load_file(file)
    embeddings = next(value for key, value in weights.items() if key.endswith("embed_tokens.weight"))
    main(["export", f"--policy.path={ours}", f"--out={tmp_path / 'plain'}"])
    main(["import", f"--from={tmp_path / 'plain'}", f"--out={tmp_path / 'back'}"])
    options = {"revision": None, "dtype": "bfloat16", "attn_implementation": None}
    models = [
        VLA0Policy.from_pretrained(ours).model,
        VLA0Policy.from_pretrained(tmp_path / "back").model,
        backbone.load_vlm(run / MODELS[name], **options)[0],
        AutoModelForImageTextToText.from_pretrained(tmp_path / "plain"),
    ]
    for model in models:
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embeddings)
        assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values())
    for folder in (ours / "vlm", tmp_path / "plain", tmp_path / "back/vlm"):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_imported_policy_acts(imported):
    policy = VLA0Policy.from_pretrained(imported("vla0_trl")[1])
    batch = {key: torch.rand(1, 3, 256, 256) for key in policy.config.camera_keys}
    with torch.no_grad():
        chunk = policy.predict_action_chunk({**batch, "task": ["turn on the stove"]})
    assert chunk.shape == (1, 8, 7) and 0 <= chunk.min() <= chunk.max() <= 1000


# Not compared: of the file, not of the model, or under another name in Transformers 5 (rope_scaling).
FILE_ONLY = {
    "model_type", "architectures", "_name_or_path", "dtype", "torch_dtype", "transformers_version",
    "vision_config", "rope_scaling",
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_text_config_is_read_as_it_was_written(name, imported):
    """Field by field: what text_config (4.57) or the top level (4.51) says of the language model."""
    folder = imported(name)[0] / MODELS[name]
    saved = json.loads((folder / "config.json").read_text())
    config = backbone.read_config(folder)
    assert config.tie_word_embeddings is True
    text = config.text_config.to_dict()
    compared = {key: value for key, value in saved.get("text_config", saved).items() if key in text}
    compared = {key: value for key, value in compared.items() if key not in FILE_ONLY}
    if not compared["use_sliding_window"]:
        compared["sliding_window"] = None
    assert {"vocab_size", "eos_token_id", "hidden_size", "rms_norm_eps"} <= compared.keys()
    assert {key: text[key] for key in compared} == compared
    rope = {"rope_type": "default", "type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    assert config.text_config.rope_parameters == rope


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run = make_run("tinyvla_lora", folder / "run", "checkpoint-1", "final")
    base = make_run("tinyvla", folder / "base", "final") / "final"
    return run, base


def test_adapter_is_merged_into_its_base(lora, tmp_path, capsys):
    run, base = lora
    main(["import", f"--from={run}", f"--base={base}", f"--out={tmp_path / 'ours'}"])
    assert (
        f"Imported final of vla0-trl or TinyVLA, its LoRA adapter merged into {base}"
        in capsys.readouterr().out
    )
    policy = VLA0Policy.from_pretrained(tmp_path / "ours")
    assert policy.config.vlm == "Qwen/Qwen2.5-VL-3B-Instruct" and policy.config.dtype == "bfloat16"
    plain, learnt = load_file(base / "model.safetensors"), load_file(run / "final/adapter_model.safetensors")
    ours = dict(policy.model.named_parameters())
    layers = {key.partition(".lora_")[0] for key in learnt}
    assert len(layers) == 20  # seven in each layer of the language model, three in each of the vision encoder
    for layer in layers:
        name = layer.removeprefix("base_model.model.")
        old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        change = learnt[f"{layer}.lora_B.weight"] @ learnt[f"{layer}.lora_A.weight"] * (32 / 16)
        assert change.abs().max() > 0.1
        merged = plain[f"{old}.weight"].float() + change
        torch.testing.assert_close(ours[f"{name}.weight"].float(), merged, rtol=0.01, atol=0.01)
    assert torch.equal(ours["model.language_model.norm.weight"], plain["model.norm.weight"])
    main(["export", f"--policy.path={tmp_path / 'ours'}", f"--out={tmp_path / 'plain'}"])
    assert AutoConfig.from_pretrained(tmp_path / "plain").tie_word_embeddings


def test_base_that_the_adapter_names(lora, tmp_path):
    run = shutil.copytree(lora[0], tmp_path / "run")
    file = run / "checkpoint-1/adapter_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"base_model_name_or_path": str(lora[1])}))
    main(["import", f"--from={run / 'checkpoint-1'}", f"--out={tmp_path / 'ours'}"])
    with safe_open(tmp_path / "ours/model.safetensors", framework="pt") as tensors:
        assert not any("lora" in name for name in tensors.keys())  # noqa: SIM118


def test_adapter_of_another_model(lora, tiny_vlm, tmp_path):
    with pytest.raises(SystemExit, match="lerobot-vla0 import: the adapter .* does not fit its base"):
        main(["import", f"--from={lora[0]}", f"--base={tiny_vlm}", f"--out={tmp_path / 'ours'}"])
    (lora[0] / "config.yaml").write_text("")
    try:
        with pytest.raises(SystemExit, match="a LoRA adapter of NVlabs/vla0"):
            main(["import", f"--from={lora[0]}", f"--base={lora[1]}", f"--out={tmp_path / 'ours'}"])
    finally:
        (lora[0] / "config.yaml").unlink()
