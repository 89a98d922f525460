import json

import numpy as np
import pytest
from conftest import make_config, randomise
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tiny_families import PICTURES, make_tiny

from lerobot_vla0.bench.common import SHAPES, random_policy
from lerobot_vla0.bench.decode import BenchDecodeConfig, bench_decode
from lerobot_vla0.bench.modes import MODES, Chunk, run_mode, tie_gap
from lerobot_vla0.bench.workloads import random_frame
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

TINY = (
    {
        "vocab_size": 640, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "fullatt_block_indexes": [1],
    },
)  # fmt: skip


@pytest.fixture
def config(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return BenchDecodeConfig(model="tiny", device="cpu", dtype="float32", repeats=1, out=tmp_path)


def test_every_mode_writes_the_recorded_text(config, capsys):
    config.workloads = ["recorded", "recorded_masked"]
    result = bench_decode(config)
    rows = {(row["workload"], row["mode"]): row for row in result["results"]}
    assert len(rows) == 2 * len(MODES)
    assert all(row["identical"] == row["chunks"] == 2 for row in rows.values())
    for workload in config.workloads:
        passes = {mode: rows[workload, mode]["passes"] for mode in MODES}
        # 207 characters and the end of turn; the grammar forces 56 of them
        assert passes["generate"] == passes["generate_grammar"] == passes["plain"] == 208
        assert passes["forced"] == 152 and passes["drafts"] < 80 and passes["prompt_lookup"] < 208
    assert rows["recorded_masked", "drafts"]["passes"] <= 50
    assert json.loads((config.out / "decode.json").read_text()) == result
    assert (config.out / "decode.png").stat().st_size > 0
    shown = capsys.readouterr().out
    assert all(f"  {mode} " in shown for mode in MODES) and "2/2" in shown


def test_batch_of_random_texts(config, capsys):
    """The worst case: no more passes than the forced tokens alone need."""
    config.workloads, config.batch_size, config.chunks = ["uniform"], 3, 3
    result = bench_decode(config)
    rows = {row["mode"]: row for row in result["results"]}
    assert "prompt_lookup is left out" in capsys.readouterr().out and "prompt_lookup" not in rows
    assert all(row["identical"] == 3 for row in rows.values())
    assert rows["drafts"]["passes"] <= rows["forced"]["passes"] < rows["plain"]["passes"]


@pytest.mark.slow
def test_recorded_actions_of_a_data_set(config, tmp_path):
    """With the chunk of one timestep before, smooth actions take fewer passes."""
    features = {
        key: {"dtype": "float32", "shape": (7,), "names": None} for key in ("action", "observation.state")
    }
    config.dataset = tmp_path / "data"
    dataset = LeRobotDataset.create(
        "local/smooth", fps=10, features=features, root=config.dataset, use_videos=False
    )
    for step in range(12):
        action = np.sin(step / 3 + np.arange(7)).astype(np.float32)
        dataset.add_frame({"action": action, "observation.state": action, "task": "pick up the milk"})
    dataset.save_episode()
    dataset.finalize()
    config.modes = ["plain", "drafts"]
    rows = {(row["workload"], row["mode"]): row for row in bench_decode(config)["results"]}
    assert {workload for workload, _ in rows} == {"recorded", "recorded_masked", "replanned", "uniform"}
    assert all(row["identical"] == 2 for row in rows.values())
    passes = {workload: rows[workload, "drafts"]["passes"] for workload, _ in rows}
    assert passes["replanned"] < passes["recorded_masked"] < passes["recorded"] < passes["uniform"]


def test_episodes_shorter_than_a_chunk(config, tiny_dataset):
    config.dataset = tiny_dataset
    with pytest.raises(ValueError, match="has no episode of more than 8 frames"):
        bench_decode(config)


def save_random(settings, dataset, config):
    """A checkpoint with random weights, for the benchmark to measure on a data set."""
    policy, folder = VLA0Policy(settings), config.out / "checkpoint"
    randomise(policy)
    stats = LeRobotDatasetMetadata("local/tiny", root=dataset).stats
    for part in (policy, *make_vla0_pre_post_processors(settings, stats)):
        part.save_pretrained(folder)
    config.model, config.dataset = str(folder), dataset


@pytest.mark.slow
def test_a_checkpoint_of_ones_own(config, tiny_vlm, tiny_dataset):
    """Its own answers, in bfloat16, where passes over different numbers of tokens may round differently."""
    save_random(make_config(tiny_vlm, chunk_size=4, n_action_steps=1), tiny_dataset, config)
    config.chunks = 6
    config.dtype, config.modes = "bfloat16", ["generate_grammar", "plain", "forced", "drafts"]
    result = bench_decode(config)
    assert {row["workload"] for row in result["results"]} == {"own", "own_replanned"}
    for row in result["results"]:
        assert row["chunks"] == 6
        if row["mode"] in ("forced", "drafts"):
            assert row["identical"] == 6 or row["gap"] < 8  # roundings of bfloat16
            assert row["passes"] < 4 * 7 * 4
    config.dataset = None
    with pytest.raises(ValueError, match="a checkpoint needs something to look at: give --dataset"):
        bench_decode(config)


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl", "gemma3"])
def test_a_checkpoint_of_another_family(family, config, tiny_dataset, tmp_path):
    """Its language model has another name, its inputs other keys; Gemma 3 decodes row by row."""
    settings = {**PICTURES[family], "chunk_size": 2, "n_action_steps": 2, "crop_ratio": 1.0}
    save_random(make_config(make_tiny(family, tmp_path / "vlm"), **settings), tiny_dataset, config)
    config.chunks, config.batch_size, config.workloads = 2, 2, ["own"]
    rows = {row["mode"]: row for row in bench_decode(config)["results"]}
    for mode in ("generate_grammar", "plain", "forced", "drafts"):
        assert rows[mode]["identical"] == 2, mode
    assert rows["drafts"]["passes"] < rows["plain"]["passes"] == rows["generate_grammar"]["passes"]


def test_gap_of_two_answers(config):
    """Large where the model clearly preferred one of them."""
    policy = random_policy(TINY, config.seed, device="cpu", dtype="float32")
    chunk = Chunk(random_frame(np.random.default_rng(0)))
    said = run_mode(policy, "plain", [chunk]).integers[0]
    assert tie_gap(policy, chunk, said, said) == 0
    other = [*said[:-1], (said[-1] + 500) % 1001]
    assert tie_gap(policy, chunk, said, other) > 100  # of float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ["fast"]}, r"modes=\['fast'\] are not among generate, "),
        ({"workloads": ["mug"]}, r"workloads=\['mug'\] are not among recorded, "),
        ({"workloads": ["own"]}, r"workloads=\['own'\] do not go with model='tiny', which is random weights"),
        ({"workloads": ["replanned"]}, "needs actions: give --dataset"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"model": "nowhere"}, "neither a checkpoint folder nor one of qwen2.5-vl-3b-random"),
    ],
)
def test_bad_settings(config, changes, message):
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        bench_decode(config)
