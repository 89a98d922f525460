import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TASKS, make_batch, make_config, observation
from lerobot.configs import NormalizationMode
from lerobot.policies.factory import make_pre_post_processors

from lerobot_vla0.dataset import TASK_RANGE, to_data_set_bins
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import ACTION_CLIPPED, make_vla0_pre_post_processors

DIM = 7


def make_meta(root: Path, seed: int = 0, tasks: list[str] = TASKS[:3]) -> SimpleNamespace:
    """What `add_task_statistics` reads of a LeRobotDataset, in two files; every task has its own range."""
    generator = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(tasks)), 40)
    width = generator.uniform(0.2, 1.0, (len(tasks), DIM))
    actions = (generator.uniform(-1, 1, (len(index), DIM)) * width[index] + 0.1 * index[:, None]).astype("f4")
    actions[:, 6] = 0.5  # never moves
    for i, rows in enumerate(np.array_split(np.arange(len(index)), 2)):
        file = root / f"data/chunk-000/file-{i:03d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = {"action": actions[rows].tolist(), "task_index": index[rows], "timestamp": rows * 0.1}
        columns |= {"episode_index": index[rows], "frame_index": rows % 40}
        pq.write_table(pa.table(columns), file)
    # A checkpoint's are sorted by name, so that the count, one number, comes first.
    stats = {"action": {"count": np.array([len(actions)]), "min": actions.min(0), "max": actions.max(0)}}
    stats["action"] |= {"q01": np.quantile(actions, 0.01, axis=0), "q99": np.quantile(actions, 0.99, axis=0)}
    frame = pandas.DataFrame({"task_index": range(len(tasks))}, index=tasks)
    return SimpleNamespace(root=root, features={}, tasks=frame, stats=stats, actions=actions, index=index)


@pytest.fixture
def meta(tmp_path):
    return make_meta(tmp_path / "data_set")


@pytest.fixture
def config(tiny_vlm):
    return make_config(tiny_vlm, action_norm="task")


@pytest.fixture
def policy(config, meta):
    return VLA0Policy(config, dataset_meta=meta, dataset_stats=meta.stats).eval()


def batch_of(meta, rows: int = 3) -> dict:
    """Row i shows task i, with eight of its actions."""
    batch = make_batch(rows)
    batch["action"] = torch.stack([torch.from_numpy(meta.actions[meta.index == i][:8]) for i in range(rows)])
    return batch


@pytest.mark.parametrize("mode", [NormalizationMode.MIN_MAX, NormalizationMode.QUANTILES])
def test_equals_numpy(mode, config, meta):
    config.normalization_mapping["ACTION"] = mode
    VLA0Policy(config, dataset_meta=meta)
    batch = batch_of(meta)
    bins = make_vla0_pre_post_processors(config, meta.stats)[0](dict(batch))["action"].numpy()
    for i in range(3):
        own = meta.actions[meta.index == i]
        share = 0.01 if mode == NormalizationMode.QUANTILES else 0
        low, high = np.quantile(own, share, axis=0), np.quantile(own, 1 - share, axis=0)
        expected = np.round((batch["action"][i].numpy() - low) / np.where(high > low, high - low, 1) * 1000)
        assert np.abs(bins[i] - expected.clip(0, 1000)).max() <= 1  # float32 against float64 at .5
    assert (bins[..., 6] == 0).all()


def test_decoding_inverts_encoding_by_the_rows_own_task(policy, config, meta, monkeypatch):
    """The policy writes the integers that it was shown; out come the actions, finer than the data set's grid
    would have them."""
    pre, post = make_vla0_pre_post_processors(config, meta.stats)
    batch = batch_of(meta)
    shown = pre(dict(batch))
    assert (shown[ACTION_CLIPPED] == 0).all() and shown[TASK_RANGE].shape == (3, 2, DIM)
    seen = pre(observation(batch))  # as in evaluation, without actions
    errors = post(to_data_set_bins(shown["action"].float(), seen[TASK_RANGE], 1000)) - batch["action"]
    widths = torch.stack([torch.from_numpy(np.ptp(meta.actions[meta.index == i], 0)) for i in range(3)])
    assert (errors.abs().amax(1) <= widths / 1000 / 2 + 1e-5).all()


def test_integers_of_a_task_are_bins_of_the_data_set():
    """The first row's task spans a quarter to a half of the data set's range, the second's all of it."""
    integers = torch.tensor([[[0, 50, 100]], [[0, 50, 100]]])
    ranges = torch.tensor([[-0.5, 0.0], [-1.0, 1.0]])[..., None].expand(2, 2, 3)
    assert to_data_set_bins(integers, ranges, 100).tolist() == [[[25.0, 37.5, 50.0]], [[0.0, 50.0, 100.0]]]
    assert to_data_set_bins(integers, None, 100) is integers


def test_the_policys_paths_agree(policy, config, meta):
    """select_action and its queue give the chunk's actions of each row's task."""
    pre, post = make_vla0_pre_post_processors(config, meta.stats)
    seen = pre(observation(batch_of(meta)))
    integers = policy.predict_action_chunk(
        {**seen, TASK_RANGE: torch.tensor([[[-1.0], [1.0]]]).expand(3, 2, 7)}
    )
    assert torch.equal(integers, integers.round())
    chunk = policy.predict_action_chunk(seen)
    low, high = ((seen[TASK_RANGE] + 1) / 2 * 1000)[:, None].unbind(2)
    torch.testing.assert_close(chunk, low + integers / 1000 * (high - low), rtol=1e-5, atol=1e-3)
    for i in range(3):
        own = meta.actions[meta.index == i]
        actions = post(chunk[i]).numpy()
        assert (actions >= own.min(0) - 1e-4).all() and (actions <= own.max(0) + 1e-4).all()
    policy.reset()
    first = policy.select_action(seen)
    # The instruction changes while actions of the old one are queued: these keep their meaning.
    other = pre({**observation(batch_of(meta)), "task": TASKS[2::-1]})
    assert torch.equal(torch.stack([first, policy.select_action(other)], 1), chunk[:, :2])
    with pytest.raises(ValueError, match="the batch has no 'action_range'"):
        policy.predict_action_chunk({k: v for k, v in seen.items() if k != TASK_RANGE})


def test_unknown_instruction_takes_the_data_sets_range_with_one_warning(policy, config, meta, caplog):
    pre, _ = make_vla0_pre_post_processors(config, meta.stats)
    plain, _ = make_vla0_pre_post_processors(make_config("vlm"), meta.stats)
    batch = {**batch_of(meta), "task": ["juggle", TASKS[1], "juggle"]}
    with caplog.at_level(logging.WARNING):
        first, again = pre(dict(batch)), pre(dict(batch))
    assert [r.getMessage() for r in caplog.records] == [
        "no action statistics of the task 'juggle': those of the whole data set are used."
    ]
    assert torch.equal(first["action"], again["action"])
    expected = plain(dict(batch))["action"]
    assert torch.equal(first["action"][::2], expected[::2])
    assert not torch.equal(first["action"][1], expected[1])
    integers = torch.arange(1001.0)[:, None].expand(3, -1, 7)
    assert torch.equal(to_data_set_bins(integers, first[TASK_RANGE], 1000)[::2], integers[::2])


def test_save_load_and_another_data_set(policy, config, meta, tmp_path):
    """As lerobot-train does it: the checkpoint's statistics when resuming, the new data set's otherwise."""
    folder = tmp_path / "checkpoint"
    policy.save_pretrained(folder)
    for processor in make_vla0_pre_post_processors(config, meta.stats):
        processor.save_pretrained(folder)
    batch = batch_of(meta)
    expected = make_vla0_pre_post_processors(config, meta.stats)[0](dict(batch))
    loaded = VLA0Policy.from_pretrained(folder)
    assert loaded.config.action_norm == "task"
    overrides = {
        "features": {**config.input_features, **config.output_features},
        "norm_map": config.normalization_mapping,
    }
    for given in ({}, {"preprocessor_overrides": {"normalizer_processor": overrides}}):  # evaluate, resume
        pre, _ = make_pre_post_processors(config, pretrained_path=str(folder), **given)
        out = pre(dict(batch))
        assert torch.equal(out["action"], expected["action"])
        assert torch.equal(out[TASK_RANGE], expected[TASK_RANGE])

    new = make_meta(tmp_path / "other", seed=1, tasks=["juggle", "dance"])
    VLA0Policy.from_pretrained(folder, config=loaded.config, dataset_meta=new)
    pre, post = make_pre_post_processors(
        config,
        pretrained_path=str(folder),
        preprocessor_overrides={"normalizer_processor": {**overrides, "stats": new.stats}},
        postprocessor_overrides={
            "unnormalizer_processor": {
                "features": config.output_features,
                "norm_map": config.normalization_mapping,
                "stats": new.stats,
            }
        },
    )
    batch = {**batch_of(new, 2), "task": ["juggle", "dance"]}
    out = pre(dict(batch))
    assert out["action"].amin() == 0 and (out[ACTION_CLIPPED] == 0).all()
    actions = post(to_data_set_bins(out["action"], out[TASK_RANGE], 1000))
    torch.testing.assert_close(actions, batch["action"], rtol=0, atol=2e-3)
