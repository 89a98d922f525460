"""The benchmarks measure what they say, on tiny models."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_config, randomise
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from tiny_families import PICTURES, make_tiny

from lerobot_vla0 import cli
from lerobot_vla0.bench import train
from lerobot_vla0.bench.decode import MODES, BenchDecodeConfig, bench_decode
from lerobot_vla0.bench.random_vlm import SHAPES, random_policy
from lerobot_vla0.bench.train import BenchTrainConfig, bench_train, per_sample_inputs
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

TINY = ((64, 128, 2, 4, 640), (2, 64, 128, 2))


@pytest.fixture
def config(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return BenchDecodeConfig(model="tiny", device="cpu", dtype="float32", repeats=1, out=tmp_path)


def test_every_mode_writes_the_recorded_text(config):
    config.workloads = ["recorded", "recorded_masked"]
    result = bench_decode(config)
    rows = {(row["workload"], row["mode"]): row for row in result["results"]}
    assert len(rows) == 2 * len(MODES)
    assert all(row["identical"] == row["chunks"] == 2 for row in rows.values())
    for workload in config.workloads:
        passes = {mode: rows[workload, mode]["passes"] for mode in MODES}
        # 207 characters and the end of turn; the grammar forces 56 of them.
        assert passes["generate"] == passes["plain"] == 208 and passes["forced"] == 152
        assert passes["drafts"] < 80 and passes["prompt_lookup"] < 208
    assert rows["recorded_masked", "drafts"]["passes"] <= 50
    assert json.loads((config.out / "decode.json").read_text()) == result


def test_batch_of_random_texts(config, capsys):
    """The worst case: no more passes than the forced tokens alone need."""
    config.workloads, config.batch_size, config.chunks = ["uniform"], 3, 3
    rows = {row["mode"]: row for row in bench_decode(config)["results"]}
    assert "prompt_lookup is left out" in capsys.readouterr().out and "prompt_lookup" not in rows
    assert all(row["identical"] == 3 for row in rows.values())
    assert rows["drafts"]["passes"] <= rows["forced"]["passes"] < rows["plain"]["passes"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_a_checkpoint(family, config, tiny_vlm, tiny_dataset, tmp_path):
    """Its own answers. Another family's language model has another name; Gemma 3 decodes row by row."""
    vlm = tiny_vlm if family == "qwen2_5_vl" else make_tiny(family, tmp_path / "vlm")
    settings = {**PICTURES.get(family, {}), "chunk_size": 2, "n_action_steps": 2, "crop_ratio": 1.0}
    policy = VLA0Policy(make_config(vlm, **settings))
    randomise(policy)
    stats = LeRobotDatasetMetadata("local/tiny", root=tiny_dataset).stats
    for part in (policy, *make_vla0_pre_post_processors(policy.config, stats)):
        part.save_pretrained(tmp_path / "checkpoint")
    config.model, config.dataset, config.chunks, config.batch_size = (
        str(tmp_path / "checkpoint"),
        tiny_dataset,
        2,
        2,
    )
    rows = {(row["workload"], row["mode"]): row for row in bench_decode(config)["results"]}
    assert {workload for workload, _ in rows} == {"own", "own_replanned"}
    assert all(row["identical"] == 2 for row in rows.values())
    assert (
        rows["own", "drafts"]["passes"] < rows["own", "plain"]["passes"] == rows["own", "generate"]["passes"]
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--modes=[fast]", "modes=['fast'] must be some of generate, "),
        ("--workloads=[own]", "workloads=['own'] must be some of recorded, "),
        ("--compile_model=true", "must be some of plain, forced, drafts"),
        ("--model=nowhere", "model='nowhere' needs --dataset, or must be one of qwen2.5-vl-3b-random"),
    ],
)
def test_bad_settings(option, message):
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "decode", option])
    assert message in str(error.value)


# -------------------------------------------------------------------------------------------------- training


@pytest.fixture
def train_config(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    # In this process; starting others takes longer than the steps.
    monkeypatch.setattr(train, "worker_pool", ThreadPoolExecutor)
    return BenchTrainConfig(model="tiny", device="cpu", batch_size=3, steps=1, repeats=1, out=tmp_path)


def test_training_steps_have_the_same_loss(train_config):
    result = bench_train(train_config)
    rows = {row["mode"]: row for row in result["results"]}
    assert list(rows) == list(train.MODES)
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["per_sample"]["loss"], rel=1e-5)
        assert row["samples_per_s"] > 0 and row["prepare_ms"] > 0 and row["peak_gib"] > 0
    assert json.loads((train_config.out / "train.json").read_text()) == result


def test_the_other_step_prepares_the_same_example(train_config):
    """Without augmentation equal to the policy's; with it, other pixels and masked text."""
    policy = random_policy(TINY, 0, device="cpu", dtype="float32")
    batch = train.make_batch(policy, train_config)
    ours, labels, _ = policy.examples.training_examples(batch, None)
    theirs, their_labels = per_sample_inputs(policy, batch, augment=False)
    assert torch.equal(their_labels, labels) and theirs.keys() == ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, msg=key)
    augmented, masked = per_sample_inputs(policy, batch, augment=True)
    assert not torch.equal(augmented["pixel_values"], theirs["pixel_values"])
    hidden = (masked != their_labels).sum()
    assert hidden > 0 and (augmented["input_ids"] == policy.examples.chat.mask_id).sum() == hidden


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.slow
def test_all_ways_of_evaluating_play_the_same_successful_episodes(libero_dataset, throw_away, tmp_path):
    pytest.importorskip("libero", reason="LIBERO is not installed")
    from lerobot_vla0.bench import eval as module

    config = module.BenchEvalConfig(dataset=libero_dataset, n_action_steps=[8], image_size=32, out=tmp_path)
    rows = module.bench_eval(config)["results"]
    assert [row["mode"] for row in rows] == list(module.MODES)
    for row in rows:
        assert row["successes"] == 2 and row["episodes_per_min"] > 0
