import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_bench_decode import TINY

from lerobot_vla0.bench import train
from lerobot_vla0.bench.common import SHAPES, random_policy
from lerobot_vla0.bench.train import BenchTrainConfig, per_sample_inputs


@pytest.fixture
def config(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    # In this process; starting others takes longer than the steps.
    monkeypatch.setattr(train, "worker_pool", ThreadPoolExecutor)
    return BenchTrainConfig(model="tiny", device="cpu", batch_size=3, steps=1, repeats=1, out=tmp_path)


def test_steps_have_the_same_loss(config, capsys):
    result = train.bench_train(config)
    rows = {row["mode"]: row for row in result["results"]}
    assert list(rows) == list(train.MODES)
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["per_sample"]["loss"], rel=1e-5)
        assert row["steps"] == 1 and row["samples_per_s"] > 0 and row["prepare_ms"] > 0
        assert row["peak_gib"] >= row["before_gib"] > 0
    assert rows["per_sample"]["speedup"] == rows["per_sample"]["memory"] == 1
    assert json.loads((config.out / "train.json").read_text()) == result
    shown = capsys.readouterr().out
    assert all(f"  {mode} " in shown for mode in rows)


@pytest.mark.slow
def test_measures_in_processes_of_their_own(config, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    config.modes = ["ours"]
    monkeypatch.setattr(train, "_memory_gib", None)  # here, not there
    (row,) = train.bench_train(config)["results"]
    assert row["peak_gib"] > 0.1


def test_the_other_step_prepares_the_same_example(config):
    """Without augmentation equal to the policy's; with it, other pixels and masked text."""
    policy = random_policy(TINY, config.seed, device="cpu", dtype="float32")
    batch = train.make_batch(policy, config)
    ours, labels, _ = policy.examples.training_examples(batch, None)
    theirs, their_labels = per_sample_inputs(policy, batch, augment=False)
    assert torch.equal(their_labels, labels) and theirs.keys() == ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, msg=key)
    augmented, masked = per_sample_inputs(policy, batch, augment=True)
    assert not torch.equal(augmented["pixel_values"], theirs["pixel_values"])
    hidden = (masked != their_labels).sum()
    assert hidden > 0 and (augmented["input_ids"] == policy.examples.chat.mask_id).sum() == hidden


def test_without_trl(config, monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    config.modes = ["per_sample_trl", "ours"]
    result = train.bench_train(config)
    assert [row["mode"] for row in result["results"]] == ["ours"]
    assert "per_sample_trl is left out: it needs trl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ["fast"]}, r"modes=\['fast'\] are not among per_sample, "),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"model": "nowhere"}, "model='nowhere' is none of qwen2.5-vl-3b-random"),
    ],
)
def test_bad_settings(config, changes, message):
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        train.bench_train(config)
