import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_config, make_stats, run_script

from lerobot_vla0.libero.evaluate import EvalConfig, _append, _check_settings
from lerobot_vla0.libero.report import read_episodes
from lerobot_vla0.libero.suites import MAX_STEPS


def test_defaults_are_the_papers_protocol():
    config = EvalConfig(out=Path("results"))
    batches = config.batches()
    assert len(batches) == 2000 and {b[0] for b in batches} == set(MAX_STEPS) - {"libero_90"}
    assert config.episodes == 50 and config.first_init_state == 0


def test_shards_cover_everything_once():
    whole = EvalConfig(out=Path("r"), suites="libero_object", episodes=10, batch_size=4)
    parts = [
        EvalConfig(out=Path("r"), suites="libero_object", episodes=10, batch_size=4, shard=f"{k}/3")
        for k in (1, 2, 3)
    ]
    split = [b for part in parts for b in part.batches()[part.part - 1 :: part.parts]]
    assert sorted(split) == sorted(whole.batches()) and len(split) == 30


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shard": "0/3"}, "shard='0/3' must be K/N"),
        ({"shard": "4/3"}, "shard='4/3' must be K/N"),
        ({"shard": "one"}, "for example 3/10"),
        ({"videos": "some"}, "videos='some' must be failures, all or none"),
        ({"suites": "libero_foo"}, "unknown LIBERO suite 'libero_foo'"),
        ({"tasks": [12]}, r"has the tasks 0..9, not \[12\]"),
        ({"episodes": 0}, "at least 1 episode"),
        ({"episodes": 10, "first_init_state": 41}, "initial states in 0..49"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(out=Path("r"), **overrides)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    settings = {"suites": "libero_object", "policy": {"n_action_steps": 8}, "versions": {"torch": "1"}}
    _check_settings(tmp_path, settings)
    _check_settings(tmp_path, {**settings, "versions": {"torch": "2"}})
    with pytest.raises(ValueError, match="other settings: policy.n_action_steps was 8, is 1"):
        _check_settings(tmp_path, {**settings, "policy": {"n_action_steps": 1}})
    with pytest.raises(ValueError, match="suites was 'libero_object', is 'libero_goal'"):
        _check_settings(tmp_path, {**settings, "suites": "libero_goal"})


def test_append_repairs_a_torn_line(tmp_path):
    path = tmp_path / "episodes-1of1.jsonl"
    path.write_text('{"suite": "a", "task_id": 0, "episode": 0, "success": true}\n{"sui')
    _append(path, [{"suite": "a", "task_id": 0, "episode": 1, "success": False}])
    assert [key[2] for key in read_episodes(tmp_path)] == [0, 1]


@pytest.fixture(scope="module")
def checkpoint(tiny_vlm, tmp_path_factory):
    from lerobot_vla0.modeling_vla0 import VLA0Policy
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    folder = tmp_path_factory.mktemp("policy")
    config = make_config(tiny_vlm, size=256, image_size=56)
    VLA0Policy(config).save_pretrained(folder)
    for processor in make_vla0_pre_post_processors(config, make_stats()):
        processor.save_pretrained(folder)
    return folder


def arguments(checkpoint: Path, out: Path) -> list[str]:
    return [
        "eval",
        f"--policy.path={checkpoint}",
        "--policy.device=cpu",
        "--suites=libero_object",
        "--tasks=[0,7]",
        "--episodes=3",
        "--max_episode_steps=6",
        "--assets=primitive",
        f"--out={out}",
    ]


def outcomes(folder: Path) -> dict:
    return {key: (e["success"], e["steps"], e["init_state"]) for key, e in read_episodes(folder).items()}


@pytest.mark.slow
def test_kill_resume_and_shards_give_one_result(checkpoint, process_env, tmp_path):
    """An uninterrupted run, one that is killed and resumed, and two shards end with the same episodes, each
    once."""
    log = run_script("lerobot-vla0", *arguments(checkpoint, tmp_path / "whole"), env=process_env).stdout
    whole = outcomes(tmp_path / "whole")
    assert len(whole) == 6 and "not LIBERO scores" in log
    assert {state for _, _, state in whole.values()} == {0, 1, 2}
    assert len(list((tmp_path / "whole/videos").glob("*_failure.mp4"))) == 6

    command = [
        str(Path(sys.executable).with_name("lerobot-vla0")),
        *arguments(checkpoint, tmp_path / "killed"),
    ]
    process = subprocess.Popen(command, env=process_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = tmp_path / "killed/episodes-1of1.jsonl"
    deadline = time.time() + 300
    while not (lines.is_file() and lines.read_text().count("\n") >= 2):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = lines.read_text().count("\n")
    assert 2 <= before < 6
    run_script("lerobot-vla0", *arguments(checkpoint, tmp_path / "killed"), env=process_env)
    assert outcomes(tmp_path / "killed") == whole
    assert lines.read_text().count("\n") == 6  # none lost, none run twice

    for shard in ("1/2", "2/2"):
        extra = [f"--shard={shard}", "--videos=none", f"--compare={tmp_path}/whole"]
        shards = [*arguments(checkpoint, tmp_path / "shards"), *extra]
        log = run_script("lerobot-vla0", *shards, env=process_env).stdout
    assert outcomes(tmp_path / "shards") == whole
    assert "6 episodes in common" in log and "p = 1" in log
    settings = json.loads((tmp_path / "whole/settings.json").read_text())
    assert settings["stand_in_assets"] and settings["versions"]["lerobot"].startswith("0.6")

    other = [*arguments(checkpoint, tmp_path / "whole"), "--policy.n_action_steps=2"]
    refused = run_script("lerobot-vla0", *other, env=process_env, check=False)
    assert refused.returncode == 1 and "policy.n_action_steps was 8, is 2" in refused.stdout


CAMERAS = ["observation.images.image", "observation.images.image2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "message"),
    [
        # LeRobot's own check lets a policy pass that has all of the environment's cameras and more.
        (
            {"input_features": dict.fromkeys([*CAMERAS, "observation.images.front"], (3, 256, 256))},
            "the policy looks at ['observation.images.front'], which LIBERO does not have",
        ),
        ({"output_features": {"action": (6,)}}, "action has 7 dimensions here, but the checkpoint"),
    ],
)
def test_policy_for_another_robot(tiny_vlm, process_env, tmp_path, features, message):
    from lerobot.configs import FeatureType, PolicyFeature

    from lerobot_vla0.modeling_vla0 import VLA0Policy
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    kinds = {"input_features": FeatureType.VISUAL, "output_features": FeatureType.ACTION}
    features = {
        name: {key: PolicyFeature(kinds[name], shape) for key, shape in entries.items()}
        for name, entries in features.items()
    }
    config = make_config(tiny_vlm, **features)
    dims = config.action_feature.shape[0]
    stats = {"action": {name: value[:dims] for name, value in make_stats()["action"].items()}}
    VLA0Policy(config).save_pretrained(tmp_path / "policy")
    for processor in make_vla0_pre_post_processors(config, stats):
        processor.save_pretrained(tmp_path / "policy")
    result = run_script(
        "lerobot-vla0", *arguments(tmp_path / "policy", tmp_path / "out"), env=process_env, check=False
    )
    assert result.returncode == 1 and message in result.stdout
