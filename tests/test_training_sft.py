"""Training with TRL: tiny model, tiny data set; in this process where one is enough."""

import json
import os
import re
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
from conftest import TINY_TASKS, make_batch, observation, run_script
from lerobot.datasets.factory import make_dataset
from lerobot.datasets.language import LANGUAGE_EVENTS, language_events_column_feature, language_feature_info
from lerobot.policies.factory import make_policy, make_pre_post_processors
from local_hub import TOKEN
from safetensors.torch import load, load_file
from tiny_families import FAMILIES, PICTURES, make_tiny
from torch.utils.data import default_collate

from lerobot_vla0 import modeling_vla0
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.training import sft as module
from lerobot_vla0.training.sft import sft
from lerobot_vla0.training.sft_options import parse

NO_AUGMENTATION = [
    "--policy.crop_ratio=1.0",
    "--policy.action_mask_prob=0",
    *(f"--policy.jitter_{kind}=0" for kind in ("brightness", "contrast", "saturation", "hue")),
]


@pytest.fixture
def arguments(tiny_dataset, tiny_vlm, tmp_path) -> list[str]:
    return [
        "--use_cpu", f"--dataset.root={tiny_dataset}", "--dataset.repo_id=local/tiny",
        f"--policy.vlm={tiny_vlm}", "--policy.image_size=56", "--dataloader_num_workers=0",
        "--per_device_train_batch_size=2",
        "--gradient_checkpointing=false", "--learning_rate=1e-3", "--logging_steps=1", "--disable_tqdm=true",
        f"--output_dir={tmp_path}/run",
    ]  # fmt: skip


@pytest.fixture
def trainer(arguments):
    """(trainer, policy, preprocessor, a batch of the data set) before the first step."""
    parsed = parse([*arguments, "--max_steps=1"])
    dataset = make_dataset(module._pipeline(parsed))
    policy = make_policy(parsed.policy, ds_meta=dataset.meta)
    processors = module._processors(policy, dataset, {})
    pipeline = module._pipeline(parsed)
    made = module.VLA0Trainer(parsed.training, pipeline, dataset, policy.train(), processors)
    return made, policy, processors[0], default_collate([dataset[i] for i in (0, 7, 13)])


def losses(output: Path) -> list[float]:
    state = json.loads(max(output.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


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
    final = sft(parse([*arguments, "--max_steps=2", "--save_steps=1", "--train_suite=libero_object"]))
    assert final == tmp_path / "run/final"
    policy = VLA0Policy.from_pretrained(final)
    pre, post = make_pre_post_processors(policy.config, str(final))
    assert post(policy.predict_action_chunk(pre(observation(make_batch(rows=1))))).shape == (1, 8, 7)
    assert policy.config.optimizer_lr == 1e-3
    train_config = json.loads((final / "train_config.json").read_text())
    assert train_config["dataset"]["episodes"] == [0, 2] and train_config["steps"] == 2
    assert {p.suffix for p in final.rglob("*.*")} == {".json", ".safetensors"}
    one, two = weights(tmp_path / "run/checkpoint-1"), weights(tmp_path / "run/checkpoint-2")
    assert any(not torch.equal(one[k], two[k]) for k in one)
    assert all(torch.equal(two[k], value) for k, value in weights(final).items())

    with pytest.raises(FileExistsError, match="run' holds a run already.*--resume_from_checkpoint true"):
        sft(parse([*arguments, "--max_steps=2"]))
    # Fine-tuning starts from it, with other data's statistics.
    arguments = [a for a in arguments if not a.startswith(("--policy", "--output_dir"))]
    more = sft(
        parse([*arguments, f"--policy.path={final}", "--max_steps=1", f"--output_dir={tmp_path}/more"])
    )
    assert any(not torch.equal(two[k], value) for k, value in weights(more).items())


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gathered_from_several_processes(lora, arguments, tmp_path):
    """FSDP hands over the VLM's weights under the VLM's names: saved like the policy's own."""
    parsed = parse([*arguments, "--max_steps=1", f"--use_lora={lora}"])
    dataset = make_dataset(pipeline := module._pipeline(parsed))
    policy = make_policy(parsed.policy, ds_meta=dataset.meta)
    adapter = policy.wrap_with_peft() if lora else None
    processors = module._processors(policy, dataset, {})
    made = module.VLA0Trainer(parsed.training, pipeline, dataset, policy, processors, adapter)
    made._save(str(tmp_path / "own"))
    gathered = deepcopy(policy.model.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # must not be what is saved
    made._save(str(tmp_path / "gathered"), state_dict=gathered)
    own, saved = tmp_path / "own", tmp_path / "gathered"
    assert {p.relative_to(own) for p in own.rglob("*")} == {p.relative_to(saved) for p in saved.rglob("*")}
    if lora:
        own, saved = (load_file(folder / "adapter_model.safetensors") for folder in (own, saved))
    else:
        own, saved = (VLA0Policy.from_pretrained(folder).state_dict() for folder in (own, saved))
    assert own.keys() == saved.keys() and all(torch.equal(own[k], value) for k, value in saved.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_and_ranges_by_task(family, arguments, tmp_path):
    settings = {"vlm": make_tiny(family, tmp_path / "vlm"), **PICTURES[family], "crop_ratio": 1.0}
    options = [f"--policy.{name}={value}" for name, value in settings.items()]
    output = sft(parse([*arguments, *options, "--policy.action_norm=task", "--max_steps=2"]))
    policy = VLA0Policy.from_pretrained(output)
    assert policy.model.config.model_type == family and policy.config.action_norm == "task"
    saved = load_file(next(output.glob("policy_postprocessor*unnormalizer*.safetensors")))
    assert {f"action.task.{task}.max" for task in TINY_TASKS} <= saved.keys()


def test_streaming(arguments, tmp_path):
    final = sft(parse([*arguments, "--dataset.streaming=true", "--max_steps=2", "--save_strategy=no"]))
    assert VLA0Policy.from_pretrained(final)
    with pytest.raises(ValueError, match="say how long to train with --max_steps"):
        sft(parse([*arguments, "--dataset.streaming=true", f"--output_dir={tmp_path}/other"]))


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("train_suite=libero_object", "train_suite='libero_object'"),
        ("max_episodes=2", "max_episodes=2"),
        ("dataset.episodes=[0]", "dataset.episodes=[0]"),
    ],
)
def test_streaming_refuses_a_choice_of_episodes(option, shown, arguments):
    """LeRobot's streaming data set would give all of them."""
    options = ["--dataset.streaming=true", "--max_steps=2", f"--{option}"]
    with pytest.raises(ValueError, match=re.escape(f"{shown} has no effect with dataset.streaming=true")):
        sft(parse([*arguments, *options]))


@pytest.mark.parametrize(
    "options",
    [
        ["--dataloader_drop_last=true", "--per_device_train_batch_size=64", "--max_steps=2"],
        ["--num_train_epochs=0"],
    ],
)
def test_training_nothing_writes_nothing(options, arguments, tmp_path):
    with pytest.raises(
        ValueError, match="nothing was trained: 24 frames make no step of per_device_train_bat"
    ):
        sft(parse([*arguments, *options]))
    assert not (tmp_path / "run/final").exists()


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


@pytest.mark.parametrize("streaming", [False, True])
def test_data_with_language_columns(streaming, arguments, annotated_dataset):
    arguments = [a for a in arguments if not a.startswith("--dataset.root")]
    data = [f"--dataset.root={annotated_dataset}", f"--dataset.streaming={streaming}"]
    assert sft(parse([*arguments, *data, "--max_steps=1", "--save_strategy=no"]))


def test_rename_map(arguments, tmp_path):
    """A checkpoint's cameras under other names than the data set's."""
    final = sft(parse([*arguments, "--max_steps=1", "--save_strategy=no"]))
    renamed = {f"observation.images.{new}": f"observation.images.{old}" for new, old in
               [("image", "front"), ("image2", "wrist")]}  # fmt: skip
    checkpoint = tmp_path / "front"
    shutil.copytree(final, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["input_features"] = {renamed.get(k, k): v for k, v in config["input_features"].items()}
    (checkpoint / "config.json").write_text(json.dumps(config))
    base = [a for a in arguments if not a.startswith(("--policy", "--output_dir"))]
    base += [f"--policy.path={checkpoint}", "--max_steps=1", "--save_strategy=no"]
    with pytest.raises(ValueError, match="use the `--rename_map` argument"):
        sft(parse([*base, f"--output_dir={tmp_path}/no"]))
    more = sft(parse([*base, f"--output_dir={tmp_path}/more", f"--rename_map={json.dumps(renamed)}"]))
    features = json.loads((more / "config.json").read_text())["input_features"]
    assert features.keys() == set(renamed.values())
    assert json.loads((more / "train_config.json").read_text())["rename_map"] == renamed
    with pytest.raises(ValueError, match="rename_map={'a': 'b'} has no effect without --policy.path"):
        sft(parse([*arguments, "--rename_map={a: b}", f"--output_dir={tmp_path}/fresh"]))


def test_goes_on_training_an_adapter(arguments, tmp_path):
    first = sft(parse([*arguments, "--max_steps=1", "--use_lora", "--lora_r=4", "--save_strategy=no"]))
    base = [a for a in arguments if not a.startswith(("--policy", "--output_dir"))]
    base += [f"--policy.path={first}", f"--output_dir={tmp_path}/more"]
    with pytest.raises(ValueError, match="lora_r=8 has no effect on the adapter policy.path="):
        parse([*base, "--use_lora", "--lora_r=8"])
    base += ["--max_steps=2", "--save_steps=1"]
    more = sft(parse(base))
    one = tmp_path / "more/checkpoint-1"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, one))
    assert before.keys() == after.keys() and not (more / "model.safetensors").exists()
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (first, more)]
    assert configs[0]["base_model_name_or_path"] == configs[1]["base_model_name_or_path"]
    assert json.loads((more / "train_config.json").read_text())["peft"]["r"] == 4
    # One step from the first adapter, not from a new one: its weights are the base of the change.
    moved = max((after[name] - value).abs().max() for name, value in before.items())
    assert moved <= 2e-3  # AdamW's first step is the learning rate, 1e-3
    policy = VLA0Policy.from_pretrained(more)
    pre, post = make_pre_post_processors(policy.config, str(more))
    assert post(policy.predict_action_chunk(pre(observation(make_batch(rows=1))))).shape == (1, 8, 7)
    whole = load_file(more / "adapter_model.safetensors")
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(tmp_path / "more" / name)
    resumed = load_file(sft(parse([*base, "--resume_from_checkpoint=true"])) / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_a_policy_without_weights_is_refused(arguments, tmp_path):
    final = sft(parse([*arguments, "--max_steps=1", "--save_strategy=no"]))
    base = [a for a in arguments if not a.startswith(("--policy", "--output_dir"))]
    options = [f"--policy.path={final}", "--policy.server=http://localhost:1/v1", "--max_steps=1"]
    with pytest.raises(ValueError, match="server"):
        sft(parse([*base, *options, f"--output_dir={tmp_path}/more"]))


def test_lora_trains_adapters_only(arguments, tmp_path):
    options = ["--max_steps=2", "--use_lora", "--lora_r=4", "--gradient_checkpointing=true"]
    final = sft(parse([*arguments, *options, "--save_strategy=no"]))
    files = {path.name for path in final.iterdir()}
    assert {
        "adapter_config.json",
        "config.json",
        "policy_preprocessor.json",
        "train_config.json",
        "vlm",
    } <= files
    assert "model.safetensors" not in files
    adapter = load_file(final / "adapter_model.safetensors")
    assert adapter and all("lora_" in name and "language_model" in name for name in adapter)
    assert all(4 in value.shape for value in adapter.values())
    # They begin at 0.
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert json.loads((final / "config.json").read_text())["use_peft"] is True


def test_lora_resumes(arguments, tmp_path):
    options = [*arguments, "--max_steps=2", "--use_lora", "--save_steps=1"]
    whole = load_file(sft(parse(options)) / "adapter_model.safetensors")
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(tmp_path / "run" / name)
    resumed = load_file(sft(parse([*options, "--resume_from_checkpoint=true"])) / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_success_rates_go_to_the_trackers(arguments, throw_away, monkeypatch, tmp_path):
    """What is evaluated, and where the figures go; a real evaluation is below."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    evaluated = []
    outcomes = {("libero_object", 3, i): {"success": i == 0} for i in range(4)}
    monkeypatch.setattr(module, "evaluate", evaluated.append)
    monkeypatch.setattr(module, "read_episodes", lambda folder: outcomes)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options = [
        "--max_steps=1", "--save_strategy=no", "--report_to=tensorboard", "--train_suite=libero_object",
        "--eval_after_train", "--eval.tasks=[3]", "--eval.episodes=4", "--eval.assets=primitive",
    ]  # fmt: skip
    final = sft(parse([*arguments, *options]))
    (config,) = evaluated
    assert (config.policy.pretrained_path, config.out) == (final, tmp_path / "run/eval")
    assert (config.suites, config.tasks, config.episodes) == ("libero_object", [3], 4)
    values = {}
    for file in (tmp_path / "board").rglob("events.*"):
        board = events.EventAccumulator(str(file))
        board.Reload()
        values |= {tag: board.Scalars(tag)[-1].value for tag in board.Tags()["scalars"]}
    assert values["eval/libero_object_success"] == 0.25 and values["train/loss"] > 0


@pytest.mark.slow
def test_push_has_lerobots_layout(arguments, hub, process_env, tmp_path):
    env = {**process_env, **hub.env(tmp_path / "hf", HF_TOKEN=TOKEN)}
    options = ["--max_steps=1", "--save_strategy=no", "--push_to_hub", "--hub_model_id=me/policy"]
    run_script("lerobot-vla0", "sft", *arguments, *options, env=env)
    files = hub.files("me/policy")
    assert {"config.json", "model.safetensors", "vlm/tokenizer.json", "README.md", "train_config.json",
            "policy_preprocessor.json", "policy_postprocessor.json"} <= files.keys()  # fmt: skip
    pushed, final = load(files["model.safetensors"]), weights(tmp_path / "run/final")
    assert pushed.keys() == final.keys() and all(torch.equal(pushed[k], final[k]) for k in final)


# -------------------------------------------------------------------------------- resumed, killed, disk full


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(arguments, tmp_path, capsys):
    """Also past the first epoch, of 12 steps: what is resumed equals an uninterrupted run bit for bit."""
    run, options = tmp_path / "run", [*arguments, "--save_steps=13", "--resume_from_checkpoint=true"]
    final = sft(parse([*arguments, "--max_steps=14", "--save_steps=13"]))
    whole = contents(run)
    sft(parse([*options, "--max_steps=14"]))
    shown = capsys.readouterr().out
    assert f"Resuming from {run}/checkpoint-14, step 14" in shown and "final is unchanged" in shown
    assert contents(run) == whole
    shutil.rmtree(final)  # killed before it was written
    sft(parse([*options, "--max_steps=14"]))
    assert contents(run) == whole
    for name in ("final", "checkpoint-14"):
        shutil.rmtree(run / name)
    sft(parse([*options, "--max_steps=14"]))
    assert contents(final)["model.safetensors"] == whole["final/model.safetensors"]
    sft(parse([*options, "--max_steps=15"]))
    assert contents(final) != {name: whole[f"final/{name}"] for name in contents(final)}
    assert json.loads((final / "train_config.json").read_text())["steps"] == 15


@pytest.fixture(scope="module")
def written_run(tiny_dataset, tiny_vlm, tmp_path_factory) -> Path:
    """A run with checkpoint-1, checkpoint-2 and final."""
    output = tmp_path_factory.mktemp("sft") / "run"
    options = [
        "--use_cpu", f"--dataset.root={tiny_dataset}", "--dataset.repo_id=local/tiny",
        f"--policy.vlm={tiny_vlm}", "--policy.image_size=56", "--dataloader_num_workers=0", "--max_steps=2",
        "--save_steps=1", "--disable_tqdm=true", f"--output_dir={output}", "--per_device_train_batch_size=2",
    ]  # fmt: skip
    sft(parse(options))
    return output


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage",
    [
        lambda last: (last / "trainer_state.json").unlink(),
        lambda last: (last / "trainer_state.json").write_text(""),
        lambda last: (last / "trainer_state.json").write_text("[]"),
        lambda last: (last / "trainer_state.json").write_text("{}"),
        lambda last: (last / "trainer_state.json").write_bytes(b"\xff"),
        lambda last: truncate(last / "model.safetensors"),
        lambda last: (last / "model.safetensors").write_text(""),
        lambda last: (last / "optimizer.pt").write_text(""),
        lambda last: truncate(last / "rng_state.pth"),
        lambda last: shutil.rmtree(last / "vlm"),
    ],
)
def test_takes_the_last_complete_checkpoint(damage, written_run, arguments, tmp_path, capsys, caplog):
    run = Path(shutil.copytree(written_run, tmp_path / "run"))
    for name in ("checkpoint-2-backup", "checkpoint-", "checkpoint-x", "checkpoint-10.tmp"):
        shutil.copytree(run / "checkpoint-2", run / name)
    training = parse([*arguments, "--resume_from_checkpoint=true"]).training
    assert module.checkpoint_to_resume(training) == run / "checkpoint-2"
    damage(run / "checkpoint-2")
    assert module.checkpoint_to_resume(training) == run / "checkpoint-1"
    assert f"{run}/checkpoint-2 is not complete: the checkpoint before it is taken" in caplog.text
    assert f"Resuming from {run}/checkpoint-1, step 1" in capsys.readouterr().out
    training = parse([*arguments, f"--resume_from_checkpoint={run}/checkpoint-2"]).training
    with pytest.raises(FileNotFoundError, match="is no complete checkpoint of this trainer"):
        module.checkpoint_to_resume(training)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_full_disk(error, arguments, tmp_path, monkeypatch):
    """At a checkpoint, then at the end."""

    def full(*args, **kwargs):
        raise error

    options = [*arguments, "--max_steps=2", "--save_steps=1"]
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="run/checkpoint-1 could not be written"),
    ):
        patch.setattr(torch, "save", full)
        sft(parse(options))
    assert list((tmp_path / "run").iterdir()) == []
    save_model = module.VLA0Trainer.save_model

    def full_at_the_end(self, folder, **internal):
        save_model(self, folder, **internal)
        if not internal:
            raise OSError(28, "No space left on device")

    message = "run/final' could not be written: .*No space left on device. Nothing of it was left"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
        patch.setattr(module.VLA0Trainer, "save_model", full_at_the_end)
        sft(parse(options))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    sft(parse([*options, "--resume_from_checkpoint=true"]))
    two = weights(tmp_path / "run/checkpoint-2")
    assert all(torch.equal(two[k], value) for k, value in weights(tmp_path / "run/final").items())


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_suite=libero_objects"], "train_suite='libero_objects' is not known"),
        (["--train_suite=libero_10"], r"no episode is left. The data set holds libero_object \(2 episodes\)"),
        (["--train_suite=libero_goal", "--dataset.episodes=[0, 2]"], "dataset.episodes holds no episode of"),
        (["--eval_after_train", "--eval.suites=libero_goal", "--eval.assets=primitive"], "libero_object"),
        (["--max_episodes=0"], "max_episodes=0 must be at least 1"),
        (["--resume_from_checkpoint=true"], "holds no complete checkpoint-N"),
        (["--resume_from_checkpoint=nowhere"], "'nowhere' is no complete checkpoint"),
        (["--use_lora", "--lora_target_modules", "q_proj", "lm_head"], "names lm_head.*never be trained"),
    ],
)
def test_bad_input(options, message, arguments, throw_away):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sft(parse([*arguments, *options]))


def test_lora_without_peft(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'adapters need peft: pip install "lerobot_policy_vla0\[peft\]"'):
        sft(parse([*arguments, "--use_lora"]))


@pytest.mark.parametrize(
    ("options", "episodes"),
    [
        (["--max_episodes=3"], [0, 1, 2]),
        (["--train_suite=libero_goal"], [1, 3]),
        (["--train_suite=libero_goal", "--max_episodes=1"], [1]),
        (["--train_suite=libero_object,libero_goal", "--dataset.episodes=[3, 0]"], [3, 0]),
    ],
)
def test_episodes(options, episodes, arguments):
    parsed = parse([*arguments, *options])
    module._choose_episodes(parsed)
    assert parsed.dataset.episodes == episodes
    assert len(make_dataset(module._pipeline(parsed))) == 6 * len(episodes)


# ------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(arguments, process_env, tmp_path):
    """Also where their shares of the supervised tokens differ: the mean is over all tokens."""
    options = [*arguments, *NO_AUGMENTATION, "--max_steps=3", "--save_steps=3"]
    torchrun = ["--nproc_per_node=2", "-m", "lerobot_vla0.cli", "sft"]
    run_script("torchrun", *torchrun, *options, f"--output_dir={tmp_path}/two", env=process_env)
    one = [*options, "--per_device_train_batch_size=4", f"--output_dir={tmp_path}/one"]
    accumulated = [*options, "--gradient_accumulation_steps=2", f"--output_dir={tmp_path}/accumulated"]
    expected = weights(sft(parse(one)))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for final in (tmp_path / "two/final", sft(parse(accumulated))):
        assert all(torch.allclose(expected[k], value, atol=1e-5) for k, value in weights(final).items())


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(arguments, process_env, tmp_path):
    options = [*arguments, "--max_steps=5", "--save_steps=2"]
    whole = weights(sft(parse([*options, f"--output_dir={tmp_path}/whole"])))
    command = [str(Path(sys.executable).with_name("lerobot-vla0")), "sft", *options]
    process = subprocess.Popen(command, env=process_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/checkpoint-2/trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "run/final").exists()
    resumed = weights(sft(parse([*options, "--resume_from_checkpoint=true"])))
    assert all(torch.equal(whole[k], value) for k, value in resumed.items())


@pytest.mark.slow
def test_evaluates_after_training_and_lerobot_train_goes_on(
    arguments, tiny_vlm, libero_dataset, process_env, tmp_path
):
    pytest.importorskip("libero", reason="LIBERO is not installed")
    options = [a for a in arguments if not a.startswith("--dataset.")]
    data = [f"--dataset.repo_id=local/{libero_dataset.name}", f"--dataset.root={libero_dataset}"]
    run_script(
        "lerobot-vla0", "sft", *options, *data, "--max_steps=1", "--save_strategy=no",
        "--train_suite=libero_object", "--eval_after_train", "--eval.episodes=1", "--eval.tasks=[7]",
        "--eval.assets=primitive", "--eval.max_episode_steps=10", "--eval.videos=none", env=process_env,
    )  # fmt: skip
    run = tmp_path / "run"
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["eval_libero_object_success"] in (0.0, 1.0)
    assert (run / "eval/report.md").is_file()
    run_script(
        "lerobot-train", *data, f"--policy.path={run}/final", "--policy.device=cpu",
        "--policy.push_to_hub=false", "--batch_size=1", "--steps=1", "--num_workers=0",
        f"--output_dir={tmp_path}/more", env=process_env,
    )  # fmt: skip
    assert (tmp_path / "more/checkpoints/last/pretrained_model/model.safetensors").is_file()
