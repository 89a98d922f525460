"""Data sets as LeRobot writes them, with faults that must show before training."""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import make_batch, make_config, make_stats, observation
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import EpisodeAwareSampler, compute_sampler_state
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.utils import cycle
from torch.utils.data import DataLoader

from lerobot_vla0.dataset import prepare_data
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import load_processors, make_vla0_pre_post_processors

STATE = "observation.state"


@pytest.fixture
def root(tiny_dataset, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "data_set"))


def meta_of(root: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("local/tiny", root=root)


def change(root: Path, key: str, frame: int, dimension: int, value: float) -> None:
    """One number of one frame, counted over all episodes of six frames."""
    (file,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(file)
    values = np.array(table[key].to_pylist(), dtype=np.float32)
    values[frame, dimension] = value
    column = pa.array(values.tolist(), type=table.schema.field(key).type)
    pq.write_table(table.set_column(table.schema.get_field_index(key), key, column), file)


def change_tasks(root: Path, change) -> None:
    """The tasks by name, and in the episodes' metadata."""
    file = root / "meta/tasks.parquet"
    table = pq.read_table(file).to_pandas()
    table.index = [change(task) for task in table.index]
    table.index.name = "task"
    table.to_parquet(file)
    for file in (root / "meta/episodes").glob("*/*.parquet"):
        table = pq.read_table(file)
        tasks = pa.array([[change(t) for t in tasks] for tasks in table["tasks"].to_pylist()])
        pq.write_table(table.set_column(table.schema.get_field_index("tasks"), "tasks", tasks), file)


def change_stats(root: Path, key: str, name: str, value: list[float]) -> None:
    file = root / "meta/stats.json"
    stats = json.loads(file.read_text())
    stats[key][name] = value
    file.write_text(json.dumps(stats))


def make_config_of(root: Path, **settings):
    config = make_config("vlm", **settings)
    prepare_data(config, meta_of(root))
    return config


@pytest.mark.parametrize(("key", "value"), [("action", np.nan), (STATE, np.inf)])
def test_frames_that_are_not_finite(key, value, root):
    change(root, key, frame=16, dimension=3, value=value)
    message = rf"{key} is {value} in episode 2, frame 4, dimension 3.*episode_indices='\[2\]'"
    with pytest.raises(ValueError, match=message):
        make_config_of(root, use_state=True)
    if key == STATE:
        make_config_of(root)  # not used


def test_blank_tasks(root):
    change_tasks(root, lambda task: "  " if task.startswith("open") else task)
    with pytest.raises(
        ValueError, match=r"has a blank task, or none, in the episodes \[1, 3\].*modify_tasks"
    ):
        make_config_of(root)


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("action", "max", [1.0] * 6 + [np.inf]),
        ("action", "max", [-5.0] * 7),
        ("action", "max", [1.0] * 3),
        ("action", "min", [[-1.0]] * 7),
        (STATE, "min", [np.nan] * 8),
    ],
)
def test_statistics_that_cannot_be_used(key, name, value, root):
    change_stats(root, key, name, value)
    with pytest.raises(ValueError, match=f"stats.json: '{key}' has min=.* they must be vectors of . finite"):
        make_config_of(root, use_state=True)


def test_statistics_that_are_missing():
    with pytest.raises(
        ValueError, match=r"dataset_stats: statistics \['min', 'max'\] of 'action' are missing"
    ):
        make_vla0_pre_post_processors(make_config("vlm"), {})
    with pytest.raises(ValueError, match="use_state=True needs the statistics"):
        make_vla0_pre_post_processors(make_config("vlm", use_state=True), {"action": make_stats()["action"]})


def test_a_streamed_data_set_is_said_to_be_unchecked(root, caplog):
    shutil.rmtree(root / "data")
    with caplog.at_level("INFO"):
        prepare_data(make_config("vlm"), meta_of(root))
    assert [r.getMessage() for r in caplog.records if "streamed" in r.getMessage()] == [
        f"{root} holds no frames (streamed data): they are not checked before training."
    ]


def test_a_state_that_is_not_used_may_have_any_size(tiny_vlm, root, tmp_path):
    """Also where a checkpoint's preprocessor normalises it, as those of earlier versions."""
    meta = meta_of(root)
    policy = make_policy(make_config(tiny_vlm), ds_meta=meta).eval()
    folder = tmp_path / "checkpoint"
    for part in (policy, *make_vla0_pre_post_processors(policy.config, meta.stats)):
        part.save_pretrained(folder)
    other = {**observation(make_batch(rows=2)), STATE: torch.rand(2, 5), "observation.torque": torch.rand(2)}
    loaded, _ = make_pre_post_processors(policy.config, pretrained_path=str(folder))  # as lerobot-eval
    expected = policy.predict_action_chunk(loaded(other))

    features = {**make_config("vlm").input_features, **policy.config.output_features}
    file = folder / "policy_preprocessor.json"
    saved = json.loads(file.read_text())
    for step in saved["steps"]:
        if step.get("registry_name") == "normalizer_processor":
            step["config"]["features"] = {
                key: {"type": feature.type.value, "shape": feature.shape} for key, feature in features.items()
            }
    file.write_text(json.dumps(saved))
    as_saved, _ = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    with pytest.raises(RuntimeError, match="size of tensor"):
        as_saved(other)
    pre, _ = load_processors(policy.config, folder)
    assert torch.equal(policy.predict_action_chunk(pre(other)), expected)


@pytest.mark.parametrize("use_state", [False, True])
def test_fine_tuning_takes_the_new_datas_shapes_into_the_config(use_state, tiny_vlm, root, tmp_path):
    config = make_config(tiny_vlm, use_state=use_state, size=100)  # cameras of 100 pixels, 8 numbers
    config.input_features[STATE] = PolicyFeature(FeatureType.STATE, (3,))
    policy = VLA0Policy(config)
    policy.save_pretrained(tmp_path / "checkpoint")
    stats = make_stats() | {STATE: {"min": [-1.0] * 3, "max": [1.0] * 3}}
    for part in make_vla0_pre_post_processors(config, stats):
        part.save_pretrained(tmp_path / "checkpoint")
    config = VLA0Policy.from_pretrained(tmp_path / "checkpoint").config
    config.pretrained_path = tmp_path / "checkpoint"
    make_policy(config, ds_meta=meta_of(root)).save_pretrained(tmp_path / "tuned")
    features = json.loads((tmp_path / "tuned/config.json").read_text())["input_features"]
    cameras = {f"observation.images.{name}" for name in ("image", "image2")}
    assert features.keys() == cameras | ({STATE} if use_state else set())
    assert all(features[key]["shape"] == [3, 64, 64] for key in cameras)
    assert not use_state or features[STATE]["shape"] == [8]


@pytest.fixture(scope="module")
def one_joint(tmp_path_factory) -> Path:
    """A data set whose action and state have one dimension, which LeRobot stores as numbers."""
    root = tmp_path_factory.mktemp("one") / "data"
    camera = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
    vector = {"dtype": "float32", "shape": (1,), "names": None}
    features = {"observation.images.image": camera, STATE: vector, "action": vector}
    dataset = LeRobotDataset.create("local/one", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for episode in range(2):
        for _ in range(10):
            frame = {key: rng.uniform(-1, 1, 1).astype(np.float32) for key in (STATE, "action")}
            frame["observation.images.image"] = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            dataset.add_frame(frame | {"task": f"turn joint {episode}"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.mark.parametrize("action_norm", ["dataset", "task"])
def test_actions_and_states_of_one_number(action_norm, one_joint, tiny_vlm):
    times = {"action": [i / 10 for i in range(8)]}
    dataset = LeRobotDataset("local/one", root=one_joint, delta_timestamps=times)
    settings = {"input_features": {}, "output_features": {}, "action_norm": action_norm, "use_state": True}
    policy = make_policy(make_config(tiny_vlm, **settings), ds_meta=dataset.meta)
    pre, post = make_vla0_pre_post_processors(policy.config, dataset.meta.stats)
    batch = lerobot_collate_fn([dataset[i] for i in (0, 1, 12)])
    assert batch["action"].shape == (3, 8) and batch[STATE].shape == (3,)
    shown = pre(dict(batch))
    assert shown["action"].shape == (3, 8, 1) and shown["action_clipped"].shape == (3,)
    if action_norm == "dataset":
        torch.testing.assert_close(post(shown["action"].float())[..., 0], batch["action"], rtol=0, atol=2e-3)
    loss, _ = policy.train()(shown)
    loss.backward()
    instructions = policy.examples.instructions(policy.examples.check(shown))
    low, high = (dataset.meta.stats[STATE][name].item() for name in ("min", "max"))
    for text, state in zip(instructions, batch[STATE].tolist(), strict=True):
        assert abs(int(text.rpartition("State: ")[2]) - (state - low) / (high - low) * 1000) <= 0.51
    for rows in (1, 3):
        seen = pre({key: value[:rows] for key, value in batch.items() if key.startswith(("obs", "task"))})
        assert policy.eval().predict_action_chunk(seen).shape == (rows, 8, 1)


def test_lerobot_resumes_the_order_of_frames_in_the_first_epoch_only():
    """LeRobot 0.6.1 on Accelerate. If the last line fails, a sentence of training/README.md has to go."""

    def batches(step: int) -> list[list[int]]:
        """Those of two epochs of 6 batches, from a step on."""
        sampler = EpisodeAwareSampler([0], [12], shuffle=True, seed=0)
        if step:
            sampler.load_state_dict(compute_sampler_state(step, len(sampler), 2, 1))
        loader = Accelerator(cpu=True).prepare(DataLoader(range(12), sampler=sampler, batch_size=2))
        return [batch.tolist() for batch in islice(cycle(loader), 12 - step)]

    whole = batches(0)
    assert batches(4) == whole[4:]
    assert batches(8) != whole[8:]


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_only_task_becomes_the_default(tasks, root, tiny_vlm, caplog):
    """Fine-tuning replaces that of an earlier training, also by none; a task of the data may be chosen."""
    if tasks == 1:
        change_tasks(root, lambda task: "open the drawer")
    config = make_config(tiny_vlm, default_task="an earlier one")
    meta = meta_of(root)
    if tasks == 1:
        meta.tasks = meta.tasks.iloc[:1]
    prepare_data(config, meta)
    assert config.default_task == ("open the drawer" if tasks == 1 else None)
    assert "default_task='an earlier one' is no task of the data set" in caplog.text
    caplog.clear()
    config.default_task = list(meta.tasks.index)[-1]
    prepare_data(config, meta)
    assert config.default_task == list(meta.tasks.index)[-1] and not caplog.text
