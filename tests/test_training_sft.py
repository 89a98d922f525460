"""Training with TRL: tiny model, tiny data set; in this process where one is enough."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, TINY_TASKS, make_batch, observation, run_script
from lerobot.datasets.factory import make_dataset
from lerobot.datasets.language import LANGUAGE_EVENTS, language_events_column_feature, language_feature_info
from lerobot.policies.factory import make_policy, make_pre_post_processors
from local_hub import TOKEN
from safetensors.torch import load, load_file
from tiny_families import FAMILIES, PICTURES, make_tiny
from torch.utils.data import default_collate

from lerobot_vla0 import modeling_vla0
from lerobot_vla0.cli import main, parse_options
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.training import sft as module
from lerobot_vla0.training.sft import SFTOptions, sft

NO_AUGMENTATION = ["--policy.crop_ratio=1.0", "--policy.action_mask_prob=0", "--policy.jitter=[0,0,0,0]"]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def arguments(tiny_dataset, tiny_vlm, tmp_path) -> list[str]:
    return [
        f"--dataset.root={tiny_dataset}", "--dataset.repo_id=local/tiny",
        f"--trainer.output_dir={tmp_path}/run", "--trainer.disable_tqdm=true",
        "--policy.type=vla0", f"--policy.vlm={tiny_vlm}", "--policy.image_size=56", "--policy.dtype=float32",
        "--policy.push_to_hub=false", "--trainer.use_cpu=true", "--trainer.dataloader_num_workers=0",
        "--trainer.per_device_train_batch_size=2", "--trainer.learning_rate=1e-3",
        "--trainer.logging_steps=1",
    ]  # fmt: skip


def parse(arguments: list[str]) -> SFTOptions:
    return parse_options(SFTOptions, "lerobot-vla0 sft", arguments)


def train(arguments: list[str], *more: str) -> Path:
    return sft(parse([*arguments, *(f"--{option}" for option in more)]))


def from_checkpoint(arguments: list[str], checkpoint: Path, output: Path) -> list[str]:
    """The same data and trainer, starting from a checkpoint."""
    rest = [a for a in arguments if not a.startswith(("--policy", "--trainer.output_dir"))]
    return [*rest, f"--policy.path={checkpoint}", f"--trainer.output_dir={output}"]


def make_trainer(options: SFTOptions, lora: bool = False):
    """(trainer, policy, preprocessor) before the first step."""
    options.trainer.complete(options.policy)
    dataset = make_dataset(pipeline := module._pipeline(options))
    policy = make_policy(options.policy, ds_meta=dataset.meta)
    adapter = policy.wrap_with_peft() if lora else None
    processors = module._processors(policy, dataset, {})
    trainer = module.VLA0Trainer(options.trainer, pipeline, dataset, policy.train(), processors, adapter)
    return trainer, policy, processors[0]


@pytest.fixture
def trainer(arguments):
    """(trainer, policy, preprocessor, a batch of the data set)."""
    made = make_trainer(parse([*arguments, "--trainer.max_steps=1"]))
    return *made, default_collate([made[0].dataset[i] for i in (0, 7, 13)])


def losses(output: Path) -> list[float]:
    state = json.loads(max(output.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_acts(checkpoint: Path) -> VLA0Policy:
    policy = VLA0Policy.from_pretrained(checkpoint)
    pre, post = make_pre_post_processors(policy.config, str(checkpoint))
    assert post(policy.predict_action_chunk(pre(observation(make_batch(rows=1))))).shape == (1, 8, 7)
    return policy


# --------------------------------------------------------------------------------------------------- options


def test_settings_come_from_the_policy(arguments, tmp_path):
    """The trainer's override them, and both stand in the checkpoint's config."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "policy: {type: vla0, optimizer_weight_decay: 0.5, optimizer_lr: 0.1}\n"
        "trainer: {learning_rate: 1.0e-5, max_steps: 7, report_to: [tensorboard]}\n"
        "dataset: {episodes: [1, 2]}\n"
    )
    options = parse([f"--config_path={file}", *arguments, "--trainer.max_steps=9"])
    options.trainer.complete(options.policy)
    training, policy = options.trainer, options.policy
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (1e-3, 0.5, 1.0)
    assert (policy.optimizer_lr, policy.optimizer_weight_decay, policy.device) == (1e-3, 0.5, "cpu")
    assert (training.max_steps, training.report_to, options.dataset.episodes) == (9, ["tensorboard"], [1, 2])
    assert (training.bf16, training.gradient_checkpointing, training.max_length) == (False, False, None)
    assert training.lr_scheduler_type == "constant_with_warmup"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("sft_*.yaml")), ids=lambda path: path.name)
def test_recipes(path):
    options = parse([f"--config_path={path}", "--trainer.use_cpu=true"])
    options.trainer.complete(options.policy)
    training, gpus = options.trainer, 8 if path.name == "sft_libero.yaml" else 1
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 64
    assert options.dataset.repo_id == "lerobot/libero" and options.policy.gradient_checkpointing
    assert training.learning_rate == (4e-5 if options.peft is None else 4e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("policy.push_to_hub=true", "push_to_hub=True needs --policy.repo_id"),
        ("rename_map={a: b}", "rename_map={'a': 'b'} has no effect without --policy.path"),
        ("train_suite=libero_objects", "train_suite='libero_objects' is not known"),
        ("trainer.resume_from_checkpoint=true", "is no complete checkpoint"),
        ("peft.target_modules=[q_proj, lm_head]", "lm_head"),
    ],
)
def test_bad_options(option, message, arguments):
    with pytest.raises(SystemExit, match=message):
        main(["sft", *arguments, f"--{option}"])


@pytest.mark.parametrize("package", ["trl", "peft"])
def test_without_an_optional_package(package, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "trl":
        monkeypatch.delitem(sys.modules, "lerobot_vla0.training.sft")
    with pytest.raises(SystemExit, match=r"lerobot-vla0 sft: .*pip install .*lerobot_policy_vla0\["):
        main(["sft", *arguments, "--peft.r=4"])


@pytest.mark.parametrize(
    ("options", "episodes"),
    [
        (["train_suite=libero_goal"], [1, 3]),
        (["train_suite=libero_object,libero_goal", "dataset.episodes=[3, 0]"], [0, 3]),
    ],
)
def test_episodes(options, episodes, arguments):
    parsed = parse([*arguments, *(f"--{option}" for option in options)])
    module._choose_episodes(parsed)
    assert parsed.dataset.episodes == episodes
    assert len(make_dataset(module._pipeline(parsed))) == 6 * len(episodes)
    with pytest.raises(ValueError, match="dataset.episodes holds no episode of train_suite"):
        module._choose_episodes(parse([*arguments, "--train_suite=libero_goal", "--dataset.episodes=[0, 2]"]))


# ----------------------------------------------------------------------------------------- the same examples


def test_same_loss_as_the_policys_own(trainer, monkeypatch):
    """Same seed, same batch, augmentation included: lerobot-train's loss is the SFTTrainer's."""
    made, policy, preprocess, batch = trainer
    inputs = made.example(batch, seed=5)
    with torch.no_grad():
        theirs = made.compute_loss(made.model, inputs)
    monkeypatch.setattr(modeling_vla0, "augmentation_generator", lambda: torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, _ = policy(preprocess(batch))
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


def test_augmentation_differs_between_ranks_steps_and_accumulated_batches(trainer, monkeypatch):
    made, _, _, batch = trainer

    def draw() -> list[torch.Tensor]:
        samples, _ = made.get_batch_samples(iter([dict(batch), dict(batch)]), 2, torch.device("cpu"))
        return [sample["pixel_values"] for sample in samples]

    first, again = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # a resumed run repeats them
    assert not torch.equal(*first)
    made.state.global_step = 1
    next_step = draw()
    made.state.global_step = 0
    monkeypatch.setattr(type(made.args), "process_index", 1)
    for other in (next_step, draw()):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_takes_no_batch_more_than_it_uses(trainer):
    made, _, _, batch = trainer
    batches = iter([dict(batch) for _ in range(3)])
    samples, tokens = made.get_batch_samples(batches, 2, torch.device("cpu"))
    assert len(samples) == 2 and len(list(batches)) == 1
    assert tokens == sum((sample["labels"] != -100).sum() for sample in samples)


# ------------------------------------------------------------------------------------------ the checkpoints


def test_writes_a_lerobot_checkpoint(arguments, tmp_path):
    final = train(arguments, "trainer.max_steps=2", "trainer.save_steps=1", "train_suite=libero_object")
    assert final == tmp_path / "run/final" and check_acts(final).config.optimizer_lr == 1e-3
    train_config = json.loads((final / "train_config.json").read_text())
    assert train_config["dataset"]["episodes"] == [0, 2] and train_config["steps"] == 2
    assert {p.suffix for p in final.rglob("*.*")} == {".json", ".safetensors"}
    one, two = weights(tmp_path / "run/checkpoint-1"), weights(tmp_path / "run/checkpoint-2")
    assert any(not torch.equal(one[k], two[k]) for k in one)
    check_equal(two, weights(final))
    with pytest.raises(FileExistsError, match="holds a run already.*--trainer.resume_from_checkpoint=true"):
        train(arguments, "trainer.max_steps=2")

    # Fine-tuning from it, with a camera under another name in the data set.
    renamed = {"observation.images.image": "observation.images.front"}
    config = json.loads((final / "config.json").read_text())
    config["input_features"] = {renamed.get(k, k): v for k, v in config["input_features"].items()}
    (final / "config.json").write_text(json.dumps(config))
    fine_tune = from_checkpoint(arguments, final, tmp_path / "more")
    with pytest.raises(ValueError, match="use the `--rename_map` argument"):
        train(fine_tune, "trainer.max_steps=1")
    more = train(fine_tune, "trainer.max_steps=1", f"rename_map={json.dumps(renamed)}")
    assert "observation.images.front" in json.loads((more / "config.json").read_text())["input_features"]
    assert json.loads((more / "train_config.json").read_text())["rename_map"] == renamed
    assert any(not torch.equal(two[k], value) for k, value in weights(more).items())


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gathered_from_several_processes(lora, arguments, tmp_path):
    """FSDP hands over the VLM's weights under the VLM's names: saved like the policy's own."""
    made, policy, _ = make_trainer(parse([*arguments, "--trainer.max_steps=1"]), lora)
    own, saved = tmp_path / "own", tmp_path / "gathered"
    made._save(str(own))
    gathered = deepcopy(policy.model.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # must not be what is saved
    made._save(str(saved), state_dict=gathered)
    assert {p.relative_to(own) for p in own.rglob("*")} == {p.relative_to(saved) for p in saved.rglob("*")}
    if lora:
        check_equal(load_file(own / ADAPTER), load_file(saved / ADAPTER))
    else:
        check_equal(*(VLA0Policy.from_pretrained(folder).state_dict() for folder in (own, saved)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_and_ranges_by_task(family, arguments, tmp_path):
    settings = {"vlm": make_tiny(family, tmp_path / "vlm"), **PICTURES[family], "crop_ratio": 1.0}
    options = [f"policy.{name}={value}" for name, value in settings.items()]
    output = train(arguments, *options, "policy.action_norm=task", "trainer.max_steps=2")
    policy = VLA0Policy.from_pretrained(output)
    assert policy.model.config.model_type == family and policy.config.action_norm == "task"
    saved = load_file(next(output.glob("policy_postprocessor*unnormalizer*.safetensors")))
    assert {f"action.task.{task}.max" for task in TINY_TASKS} <= saved.keys()


@pytest.fixture(scope="module")
def annotated_dataset(tiny_dataset, tmp_path_factory) -> Path:
    """The tiny data set with LeRobot's language columns, lists of varying length."""
    root = Path(shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("annotated") / "data"))
    (file,) = (root / "data").glob("*/*.parquet")
    frames = datasets.Dataset.from_parquet(str(file), cache_dir=str(root.parent / "cache"))
    event = {"role": "user", "content": "now", "style": "interjection", "camera": None, "tool_calls": None}
    rows = [[event] * (i % 3) for i in range(len(frames))]
    features = datasets.Features({LANGUAGE_EVENTS: language_events_column_feature()})
    events = datasets.Dataset.from_dict({LANGUAGE_EVENTS: rows}, features=features)
    datasets.concatenate_datasets([frames, events], axis=1).to_parquet(file)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] |= {LANGUAGE_EVENTS: language_feature_info()[LANGUAGE_EVENTS]}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_data_with_language_columns_also_streamed(streaming, arguments, annotated_dataset):
    data = [f"dataset.root={annotated_dataset}", f"dataset.streaming={streaming}", "trainer.max_steps=1"]
    assert VLA0Policy.from_pretrained(train(arguments, *data))
    if streaming == "true":
        with pytest.raises(ValueError, match=r"dataset.episodes=\[0\] has no effect with dataset.streaming"):
            train(arguments, *data, "dataset.episodes=[0]", "trainer.output_dir=other")


def test_training_nothing_writes_nothing(arguments, tmp_path):
    options = ["trainer.dataloader_drop_last=true", "trainer.per_device_train_batch_size=64"]
    with pytest.raises(ValueError, match="nothing was trained: 24 frames make no step. Lower"):
        train(arguments, *options, "trainer.max_steps=2")
    assert not (tmp_path / "run/final").exists()


def test_adapters_are_trained_resumed_and_trained_on(arguments, tmp_path):
    run, steps = tmp_path / "run", ["trainer.max_steps=2", "trainer.save_steps=1"]
    lora = [*steps, "peft.method_type=LORA", "peft.r=4", "policy.gradient_checkpointing=true"]
    first = train(arguments, *lora)
    files = {path.name for path in first.iterdir()}
    assert {"adapter_config.json", "config.json", "policy_preprocessor.json", "vlm"} <= files
    assert "model.safetensors" not in files
    whole = load_file(first / ADAPTER)
    assert whole and all("lora_" in name and "language_model" in name for name in whole)
    assert all(4 in value.shape for value in whole.values())
    # They begin at 0.
    assert all(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)

    shutil.rmtree(run / "checkpoint-2")
    check_equal(load_file(train(arguments, *lora, "trainer.resume_from_checkpoint=true") / ADAPTER), whole)

    base = from_checkpoint(arguments, first, tmp_path / "more")
    with pytest.raises(ValueError, match="peft has no effect on the adapter"):
        train(base, *lora)
    more = train(base, *steps)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, more)]
    assert configs[0]["base_model_name_or_path"] == configs[1]["base_model_name_or_path"]
    assert json.loads((more / "train_config.json").read_text())["peft"]["r"] == 4
    # One step from the first adapter, not from a new one: AdamW's first step is the learning rate, 1e-3.
    moved = load_file(tmp_path / "more/checkpoint-1" / ADAPTER)
    assert 0 < max((moved[name] - value).abs().max() for name, value in whole.items()) <= 2e-3
    check_acts(more)


def test_a_policy_without_weights_is_refused(arguments, learnt, tmp_path):
    base = from_checkpoint(arguments, learnt[0], tmp_path / "more")
    with pytest.raises(ValueError, match="server"):
        train(base, "policy.server=http://localhost:1/v1", "trainer.max_steps=1")


@pytest.mark.slow
def test_push_has_lerobots_layout(arguments, hub, process_env, tmp_path):
    env = {**process_env, **hub.env(tmp_path / "hf", HF_TOKEN=TOKEN)}
    options = ["--trainer.max_steps=1", "--policy.push_to_hub=true", "--policy.repo_id=me/policy"]
    run_script("lerobot-vla0", "sft", *arguments, *options, env=env)
    files = hub.files("me/policy")
    assert {"config.json", "model.safetensors", "vlm/tokenizer.json", "README.md", "train_config.json",
            "policy_preprocessor.json", "policy_postprocessor.json"} <= files.keys()  # fmt: skip
    check_equal(load(files["model.safetensors"]), weights(tmp_path / "run/final"))


# -------------------------------------------------------------------------------- resumed, several processes


def test_resumed_equals_uninterrupted(arguments, tmp_path):
    """Also past the first epoch, of 12 steps, and where the last checkpoint was not finished. A finished run
    stays as it is, or is trained on."""
    run, options = tmp_path / "run", ["trainer.save_steps=13", "trainer.max_steps=14"]
    resume = [*options, "trainer.resume_from_checkpoint=true"]
    final = train(arguments, *options)
    whole = weights(final)
    check_equal(weights(train(arguments, *resume)), whole)
    shutil.rmtree(final)
    (run / "checkpoint-14/trainer_state.json").unlink()  # written last
    for name in ("checkpoint-14-backup", "checkpoint-x"):
        shutil.copytree(run / "checkpoint-13", run / name)
    options = parse([*arguments, f"--{resume[-1]}"])
    options.trainer.complete(options.policy)
    assert module._checkpoint_to_resume(options.trainer) == run / "checkpoint-13"
    check_equal(weights(train(arguments, *resume)), whole)
    longer = train(arguments, *resume, "trainer.max_steps=15")
    assert json.loads((longer / "train_config.json").read_text())["steps"] == 15
    assert any(not torch.equal(whole[name], value) for name, value in weights(longer).items())


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(arguments, process_env, tmp_path):
    """Also where their shares of the supervised tokens differ: the mean is over all tokens."""
    options = [*arguments, *NO_AUGMENTATION, "--trainer.max_steps=3", "--trainer.save_steps=3"]
    torchrun = ["--nproc_per_node=2", "-m", "lerobot_vla0.cli", "sft"]
    run_script("torchrun", *torchrun, *options, f"--trainer.output_dir={tmp_path}/two", env=process_env)
    batch, steps = "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2"
    expected = weights(train(options, batch, f"trainer.output_dir={tmp_path}/one"))
    accumulated = train(options, steps, f"trainer.output_dir={tmp_path}/accumulated")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for final in (tmp_path / "two/final", accumulated):
        assert all(torch.allclose(expected[k], value, atol=1e-5) for k, value in weights(final).items())


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_and_lerobot_train_goes_on(
    arguments, process_env, tiny_dataset, tmp_path
):
    options = [*arguments, "--trainer.max_steps=5", "--trainer.save_steps=2"]
    whole = weights(train(options, f"trainer.output_dir={tmp_path}/whole"))
    command = [str(Path(sys.executable).with_name("lerobot-vla0")), "sft", *options]
    process = subprocess.Popen(command, env=process_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/checkpoint-2/trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "run/final").exists()
    final = train(options, "trainer.resume_from_checkpoint=true")
    check_equal(weights(final), whole)
    run_script(
        "lerobot-train", f"--dataset.root={tiny_dataset}", "--dataset.repo_id=local/tiny",
        f"--policy.path={final}", "--policy.device=cpu", "--policy.push_to_hub=false", "--batch_size=1",
        "--steps=1", "--num_workers=0", f"--output_dir={tmp_path}/more", env=process_env,
    )  # fmt: skip
    assert (tmp_path / "more/checkpoints/last/pretrained_model/model.safetensors").is_file()
