"""Imported checkpoints see, say and do what the code does that they were trained with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_stats, observation, shared
from peers import HIGH, LOW, WORDS, make_run, save_model, write_config, write_stats
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lerobot_vla0 import vlm
from lerobot_vla0.cli import main
from lerobot_vla0.convert import export as export_module
from lerobot_vla0.dataset import PREFIX
from lerobot_vla0.examples import Observation
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import load_processors, make_vla0_pre_post_processors

# ------------------------------------------------------------------------- folders of the three other codes

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


def pixels(file) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_pictures_and_actions_are_theirs(name, imported):
    """Pictures to the byte, and the pixels that their processor makes of them; bins by their statistics."""
    run, ours = imported(name)
    policy = VLA0Policy.from_pretrained(ours)
    examples, layouts, acting = policy.examples, shared("peer_layouts"), name.removesuffix("_sharded")
    files = {code: layouts / code / "acting/cases.json" for code in (acting, "vla0_trl")}
    cases = {code: json.loads(file.read_text()) for code, file in files.items()}
    # TinyVLA's prompt for acting lacks a clause of the one that it trains with, which is vla0-trl's.
    prompts = {case["task"]: case["input_ids"] for case in cases[acting.replace("tinyvla", "vla0_trl")]}
    processor = AutoProcessor.from_pretrained(run / MODELS[name])
    sizes = set()
    for case in cases[acting]:
        cameras = [pixels(layouts / f"camera_case{case['case']}_{i}.png")[None] / 255 for i in (0, 1)]
        sizes.add(tuple(cameras[0].shape[-2:]))
        file = layouts / f"{acting}/acting/case{case['case']}_picture.png"
        observed = Observation(cameras, [case["task"]], None, None)
        assert torch.equal(examples.pictures(observed, None)[0, 0], pixels(file)), case
        inputs = examples.acting_inputs(observed)
        theirs = processor.image_processor(images=[Image.open(file)], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompts[case["task"]]
        assert torch.equal(inputs["image_grid_thw"], theirs["image_grid_thw"])
        torch.testing.assert_close(inputs["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-6)
    assert {(224, 224), (256, 256)} <= sizes and ("4_57" in name or (600, 600) in sizes)
    bins = torch.randint(1001, (1, 8, 7))
    low, high = np.array(LOW), np.array(HIGH)
    actions = load_processors(policy.config, ours)[1](bins)[0].numpy()
    np.testing.assert_allclose(actions, bins[0].numpy() / 1000 * (high - low) + low, atol=1e-6)


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
        vlm.load_vlm(run / MODELS[name], **options)[0],
        AutoModelForImageTextToText.from_pretrained(tmp_path / "plain"),
    ]
    for model in models:
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embeddings)
        assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values())
    for folder in (ours / "vlm", tmp_path / "plain", tmp_path / "back/vlm"):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


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
    config = vlm.read_config(folder)
    text = config.text_config.to_dict()
    compared = {key: value for key, value in saved.get("text_config", saved).items() if key in text}
    compared = {key: value for key, value in compared.items() if key not in FILE_ONLY}
    if not compared["use_sliding_window"]:
        compared["sliding_window"] = None
    assert {"vocab_size", "eos_token_id", "hidden_size", "rms_norm_eps"} <= compared.keys()
    assert {key: text[key] for key in compared} == compared and config.tie_word_embeddings is True
    rope = {"rope_type": "default", "type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    assert config.text_config.rope_parameters == rope


def test_adapter_is_merged_into_its_base(tmp_path, tiny_vlm):
    run = make_run("tinyvla_lora", tmp_path / "run", "final")
    base = make_run("tinyvla", tmp_path / "base", "final") / "final"
    main(["import", f"--from={run}", f"--base={base}", f"--out={tmp_path / 'ours'}"])
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

    file = run / "final/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tiny_vlm)}))
    with pytest.raises(SystemExit, match="lerobot-vla0 import: the adapter .* does not fit its base"):
        run_import(run, tmp_path / "other")


# ---------------------------------------------------------------------------------------- runs on a tiny VLM


@pytest.fixture(scope="module")
def trained(tiny_vlm, tmp_path_factory) -> Path:
    return save_model(tiny_vlm, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def original(trained, tmp_path) -> Path:
    """A run of NVlabs/vla0."""
    shutil.copytree(trained, tmp_path / "vla0/model_last")
    write_config(tmp_path / "vla0")
    write_stats(tmp_path / "vla0", "dataset_stats.pkl")
    return tmp_path / "vla0"


@pytest.fixture
def trl(trained, tmp_path) -> Path:
    """A run of vla0-trl."""
    shutil.copytree(trained, tmp_path / "trl/final")
    write_stats(tmp_path / "trl", "dataset_stats.json")
    return tmp_path / "trl"


def run_import(source: Path | str, out: Path, *options: str):
    main(["import", f"--from={source}", f"--out={out}", *options])
    return VLA0Policy.from_pretrained(out).config


def test_settings_of_the_config_and_the_card(original, tmp_path):
    words = WORDS.replace("0.875", "0.9").replace("'3p1','3p2'", "'wrist','top'")
    write_config(original, words, horizon=4, num_bins_actions=500, action_mask_aug_per=0.1)
    with pytest.raises(SystemExit, match="config.yaml does not tell cameras, .*--cameras="):
        run_import(original, tmp_path / "ours")
    shutil.copytree(original / "model_last", original / "model_3")
    (original / "model_last").rename(original / "model_10")
    (original / "model_3/model.safetensors").write_bytes(b"broken: must not be read")
    config = run_import(original, tmp_path / "ours", "--cameras=[wrist, observation.images.top]")
    assert (config.chunk_size, config.n_action_steps, config.num_bins) == (4, 4, 500)
    assert (config.image_size, config.crop_ratio, config.tile_images) == (224, 0.9, True)
    assert (config.picture_rule, config.action_mask_prob) == ("NVlabs", 0.1)
    assert config.camera_keys == ["wrist", "observation.images.top"]

    file = original / "model_10/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": "4.51.3"}))
    assert not run_import(original / "model_10.pth", tmp_path / "old", "--cameras=[a, b]").add_vision_id
    card = (tmp_path / "old/README.md").read_text()
    assert "| model_10 of NVlabs/vla0; add_vision_id=false, as transformers 4.51.3 drops it" in card
    assert run_import(original, tmp_path / "on", "--cameras=[a, b]", "--add_vision_id=true").add_vision_id


def test_options_of_what_is_not_recorded(trl, tmp_path):
    (trl / "final").rename(trl / "checkpoint-9")
    shutil.copytree(trl / "checkpoint-9", trl / "checkpoint-10")
    (trl / "checkpoint-9/model.safetensors").write_bytes(b"broken: must not be read")
    (trl / "dataset_stats.json").rename(tmp_path / "stats.json")
    with pytest.raises(SystemExit, match=r"no dataset_stats.pkl or dataset_stats.json: .*--stats="):
        run_import(trl, tmp_path / "ours")
    options = [f"--stats={tmp_path}/stats.json", "--chunk_size=5", "--crop_ratio=1", "--num_bins=255"]
    config = run_import(trl, tmp_path / "ours", *options)
    assert (config.chunk_size, config.n_action_steps, config.crop_ratio) == (5, 5, 1.0)
    assert (config.num_bins, config.picture_rule, config.add_vision_id) == (255, "vla0-trl", False)
    with pytest.raises(SystemExit, match="made for pictures of 100352 pixels, not for 1 cameras of 224×224"):
        run_import(trl, tmp_path / "other", *options, "--cameras=[observation.images.front]")


def test_type_of_the_weights_is_the_files(trl, tmp_path):
    """Not the one that config.json names; float32 if there are several."""
    file = trl / "final/model.safetensors"
    assert json.loads((trl / "final/config.json").read_text())["dtype"] == "float32"
    weights = {key: value.bfloat16() for key, value in load_file(file).items()}
    for expected in ("bfloat16", "float32"):
        save_file(weights, file, {"format": "pt"})
        assert run_import(trl, tmp_path / expected).dtype == expected
        ours = load_file(tmp_path / expected / "model.safetensors")
        assert {str(value.dtype) for value in ours.values()} == {f"torch.{expected}"}
        weights["model.norm.weight"] = weights["model.norm.weight"].float()


def embeddings(run: Path) -> torch.Tensor:
    return load_file(run / "final/model.safetensors")["model.embed_tokens.weight"]


def damage(run: Path, **changed: torch.Tensor | None) -> None:
    file = run / "final/model.safetensors"
    weights = load_file(file) | {name.replace("__", "."): value for name, value in changed.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run / "final"), "holds no model"),
        (lambda run: (run / "final/config.json").write_text('{"type": "act"}'), "Unrecognized model"),
        (lambda run: write_stats(run, "dataset_stats.pkl"), "has no config.yaml, which says how"),
        (lambda run: write_config(run, original_action_dim=6), "dataset_stats.json: 'action' has"),
        (lambda run: damage(run, model__norm__weight=None), "do not fit .*language_model.norm.weight"),
        (lambda run: damage(run, action_head=torch.ones(3)), "do not fit .*action_head"),
        (lambda run: damage(run, model__norm__weight=torch.ones(3)), "do not fit .*norm.weight"),
        (lambda run: damage(run, lm_head__weight=embeddings(run) + 1), "do not fit .*lm_head.weight"),
    ],
)
def test_refused(change, message, trl, tmp_path):
    change(trl)
    with pytest.raises(SystemExit, match=f"(?s)lerobot-vla0 import: .*{message}"):
        run_import(trl, tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["trl"]


# --------------------------------------------------------------------------------------------------- exports


def contents(folder: Path) -> dict:
    """Path in the folder → content of the file."""
    found = {}
    for file in folder.rglob("*.*"):
        name = str(file.relative_to(folder))
        if file.suffix == ".json":
            found[name] = json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            found[name] = {key: (str(value.dtype), value.tolist()) for key, value in load_file(file).items()}
            # Embeddings and a head that is tied to them are stored once, under either name.
            heads = [k for k in found[name] if k.endswith(("embed_tokens.weight", "lm_head.weight"))]
            if len(heads) == 1:
                found[name]["tied"] = found[name].pop(heads[0])
    return found


def check_round_trip(folder: Path, tmp_path: Path) -> None:
    main(["export", f"--policy.path={folder}", f"--out={tmp_path / 'plain'}"])
    main(["import", f"--from={tmp_path / 'plain'}", f"--out={tmp_path / 'back'}"])
    before, after = contents(folder), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name] == after[name], name


def test_import_undoes_export(learnt, tmp_path):
    folder, batch = learnt
    check_round_trip(folder, tmp_path)
    expected = VLA0Policy.from_pretrained(folder).predict_action_chunk(observation(batch))
    back = VLA0Policy.from_pretrained(tmp_path / "back")
    assert torch.equal(back.predict_action_chunk(observation(batch)), expected)
    with pytest.raises(SystemExit, match="'chunk_size': 8}: an export records how"):
        run_import(tmp_path / "plain", tmp_path / "other", "--chunk_size=8")


def test_import_undoes_export_of_shards_and_statistics_by_task(learnt, tmp_path, monkeypatch):
    policy = VLA0Policy.from_pretrained(learnt[0])
    policy.config.action_norm, policy.config.dtype = "task", "bfloat16"
    policy.to(torch.bfloat16)
    stats = make_stats()
    stats |= {f"{PREFIX}open the drawer": {"min": torch.full((7,), -0.1), "max": torch.full((7,), 0.3)}}
    for part in (policy, *make_vla0_pre_post_processors(policy.config, stats)):
        part.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr(export_module, "SHARD_BYTES", 100_000)
    check_round_trip(tmp_path / "checkpoint", tmp_path)
    assert len(list((tmp_path / "plain").glob("model-*.safetensors"))) > 2
    (tmp_path / "plain/lerobot/policy_preprocessor.json").write_text('{"steps": [{"class": "os.system"}]}')
    with pytest.raises(SystemExit, match="policy_preprocessor.json has the steps"):
        run_import(tmp_path / "plain", tmp_path / "hostile")
