import json
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import psutil
import pytest
from conftest import make_config, make_stats, run_script
from lerobot.configs import PreTrainedConfig
from safetensors.torch import load_file, save_file

from lerobot_vla0 import cli
from lerobot_vla0.libero import evaluate as module
from lerobot_vla0.libero.evaluate import EvalConfig
from lerobot_vla0.libero.pool import Result
from lerobot_vla0.libero.report import read_episodes
from lerobot_vla0.libero.suites import MAX_STEPS


def test_defaults_are_the_papers_protocol():
    config = EvalConfig(out=Path("results"))
    jobs = config.jobs(1, 1)
    assert len(jobs) == 2000 and {job.suite for job in jobs} == set(MAX_STEPS) - {"libero_90"}
    assert config.episodes == 50 and all(job.init_state == job.episode for job in jobs)


def test_shards_cover_everything_once():
    """Whatever the batch size; each has an equal share of every suite, and few tasks."""
    config = EvalConfig(out=Path("r"), suites="libero_object,libero_goal", episodes=10, first_init_state=40)
    parts = [config.jobs(part, 3) for part in (1, 2, 3)]
    assert sorted(chain(*parts)) == sorted(config.jobs(1, 1)) and len(config.jobs(1, 1)) == 200
    for jobs in parts:
        assert sum(job.suite == "libero_goal" for job in jobs) in (33, 34)
        assert len({job[:2] for job in jobs}) <= 8
        assert all(job.init_state == 40 + job.episode for job in jobs)


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
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"tasks": [7, 7]}, r"tasks=\[7, 7\] must name at least one task, and each once"),
        ({"tasks": []}, r"tasks=\[\] must name at least one task"),
        ({"suites": ""}, "suites='' must name at least one suite"),
        ({"suites": "libero_10,libero_10"}, "and each once"),
        ({"image_size": 0}, r"image_size=0 must be in 1\.\.2048"),
        ({"image_size": 10**9}, "image_size=1000000000 must be"),
        ({"max_episode_steps": 0}, "max_episode_steps=0 must be at least 1, or None"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(out=Path("r"), **overrides)


class Pool:
    """In place of the environments: every episode fails after three steps, and `broken` after the first."""

    broken = False

    def __init__(self, size, **settings):
        Pool.settings = settings

    def play(self, jobs, begin, act, film):
        for number, job in enumerate(jobs):
            if Pool.broken and number:
                raise RuntimeError("the environment died")
            yield Result(job, "pick up", False, 3, None)

    def close(self):
        pass


@pytest.fixture
def quick(monkeypatch, checkpoint, throw_away, tmp_path):
    """Runs `lerobot-vla0 eval` in this process without a simulator; returns its message if it fails."""
    monkeypatch.setattr(module, "EnvironmentPool", Pool)
    monkeypatch.setattr(Pool, "broken", False)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr("lerobot_vla0.libero.assets.find_library", lambda name: name)

    def run(*options: str, policy: Path = checkpoint) -> str | None:
        options = {
            option.partition("=")[0]: option for option in (*arguments(policy, tmp_path / "out"), *options)
        }
        try:
            cli.main(list(options.values()))
        except SystemExit as error:
            return error.code

    return run


def lines_of(folder: Path) -> list[str]:
    return [line for path in folder.glob("episodes-*") for line in path.read_text().splitlines()]


def test_a_run_that_fails_at_its_start_leaves_nothing(quick, checkpoint, monkeypatch, tmp_path):
    """Whatever it fails of; the corrected command then runs."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "file").write_text("")
    for mistake, message in {
        "--tasks=[7,7]": "tasks=[7, 7] must name",
        "--image_size=0": "image_size=0 must be",
        "--max_episode_steps=0": "max_episode_steps=0 must be",
        "--assets=/nowhere": "assets='/nowhere' is neither",
        f"--compare={tmp_path}/none": "holds no finished episode",
        f"--out={tmp_path}/file/out": f"{tmp_path}/file",
    }.items():
        assert message in quick(mistake)
    assert "model.safetensors could not be loaded" in quick(policy=broken)
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    monkeypatch.delitem(sys.modules, "robosuite", raising=False)
    assert "MUJOCO_GL=vulkan renders nothing. Set it to egl or osmesa" in quick()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"]
    # Settings that an earlier version wrote before its start failed do not block, either.
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text('{"suites": "libero_goal", "policy": {}}')
    assert quick() is None and len(lines_of(tmp_path / "out")) == 6
    seen = PreTrainedConfig.from_pretrained(checkpoint).camera_keys
    assert [f"observation.images.{camera}" for camera in Pool.settings["cameras"]] == seen


def test_no_finished_episode_is_lost(quick, tmp_path):
    """An environment that dies ends the command; the same command goes on."""
    Pool.broken = True
    for number in (1, 2):
        assert quick("--videos=none") == "lerobot-vla0 eval: the environment died"
        assert len(lines_of(tmp_path / "out")) == number
    Pool.broken = False
    # What a kill left of a line is taken away, and nothing else is written anew.
    path = tmp_path / "out/episodes-1of1.jsonl"
    before = path.read_text()
    path.write_text(before + '{"sui')
    inode = path.stat().st_ino
    assert quick("--videos=none") is None
    assert path.read_text().startswith(before) and path.stat().st_ino == inode
    assert len(read_episodes(tmp_path / "out")) == len(lines_of(tmp_path / "out")) == 6
    assert [json.loads(line)["init_state"] for line in lines_of(tmp_path / "out")] == [0, 1, 2] * 2


def test_a_folder_of_other_settings_is_refused(quick, checkpoint, tmp_path):
    assert quick() is None
    assert quick("--batch_size=2") is None  # finished; the results do not depend on it
    assert "other settings: policy.n_action_steps was 8, is 1" in quick("--policy.n_action_steps=1")
    assert "episodes was 3, is 2" in quick("--episodes=2")
    # Other weights under the same path.
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    assert quick(f"--out={tmp_path}/second", policy=other) is None
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    assert "other settings: weights was" in quick(f"--out={tmp_path}/second", policy=other)


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


def environments_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that the fork server has forked."""
    (server,) = [
        child for child in psutil.Process(process.pid).children() if "forkserver" in " ".join(child.cmdline())
    ]
    return server.children()


@pytest.mark.slow
def test_kill_and_resume_give_one_result(checkpoint, process_env, tmp_path):
    """An uninterrupted run and one that is killed and resumed end with the same episodes, each once. (Parts:
    test_libero_ranks.py.)"""
    log = run_script("lerobot-vla0", *arguments(checkpoint, tmp_path / "whole"), env=process_env).stdout
    whole = outcomes(tmp_path / "whole")
    assert len(whole) == 6 and "not LIBERO scores" in log
    assert {state for _, _, state in whole.values()} == {0, 1, 2}
    assert len(list((tmp_path / "whole/videos").glob("*_failure.mp4"))) == 6

    command = [
        str(Path(sys.executable).with_name("lerobot-vla0")),
        *arguments(checkpoint, tmp_path / "killed"),
        "--batch_size=2",
    ]
    log = tmp_path / "log"
    lines = tmp_path / "killed/episodes-1of1.jsonl"

    def start_and_wait(count: int) -> subprocess.Popen:
        with log.open("w") as output:
            process = subprocess.Popen(command, env=process_env, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.time() + 500
        while not (lines.is_file() and lines.read_text().count("\n") >= count):
            assert process.poll() is None and time.time() < deadline, log.read_text()
            time.sleep(0.05)
        return process

    # An environment is killed: the command ends with a message. The command itself is killed: the
    # environments end by themselves.
    process = start_and_wait(1)
    environments = environments_of(process)
    assert len(environments) == 2
    environments[0].kill()
    assert process.wait(timeout=60) == 1 and "ended with exit code -9" in log.read_text()
    process = start_and_wait(lines.read_text().count("\n") + 1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    before = lines.read_text().count("\n")
    assert 2 <= before < 6
    compared = f"--compare={tmp_path / 'whole'}"
    resumed = run_script("lerobot-vla0", *command[1:], compared, env=process_env).stdout
    assert outcomes(tmp_path / "killed") == whole
    assert lines.read_text().count("\n") == 6  # none lost, none run twice
    assert "6 episodes in common" in resumed and "p = 1" in resumed
    settings = json.loads((tmp_path / "whole/settings.json").read_text())
    assert settings["stand_in_assets"] and settings["versions"]["lerobot"].startswith("0.6")

    with pytest.raises(SystemExit, match="policy.n_action_steps was 8, is 2"):
        cli.main([*arguments(checkpoint, tmp_path / "whole"), "--policy.n_action_steps=2"])


CAMERAS = ["observation.images.image", "observation.images.image2"]


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
def test_policy_for_another_robot(quick, tiny_vlm, tmp_path, features, message):
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
    assert message in quick(policy=tmp_path / "policy")
