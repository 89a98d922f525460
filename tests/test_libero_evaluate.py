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
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from safetensors.torch import load_file, save_file

from lerobot_vla0 import cli
from lerobot_vla0.libero import evaluate as module
from lerobot_vla0.libero.evaluate import EvalConfig, find_rank
from lerobot_vla0.libero.pool import Result
from lerobot_vla0.libero.report import compare, read_episodes, wilson, write_report
from lerobot_vla0.libero.suites import MAX_STEPS


def test_defaults_are_the_papers_protocol():
    jobs = EvalConfig(out=Path("results")).jobs(1, 1)
    assert len(jobs) == 2000 and {job.suite for job in jobs} == set(MAX_STEPS) - {"libero_90"}
    assert {(job.episode, job.init_state) for job in jobs} == {(i, i) for i in range(50)}


def test_shards_cover_everything_once():
    """Each has an equal share of every suite, and few tasks."""
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
        ({"shard": "4/3"}, "shard='4/3' must be K/N"),
        ({"videos": "some"}, "videos='some' must be failures, all or none"),
        ({"suites": "libero_10,libero_10"}, "must name at least one suite, and each once"),
        ({"tasks": [7, 7]}, r"tasks=\[7, 7\] must name at least one task, and each once"),
        ({"episodes": 10, "first_init_state": 41}, "initial states in 0..49"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps=0 must be at least 1, or None"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(out=Path("r"), **overrides)


class Pool:
    """In place of the environments: every episode fails after three steps; `broken` after the first one."""

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


def make_checkpoint(folder: Path, vlm: Path, **settings) -> Path:
    from lerobot_vla0.modeling_vla0 import VLA0Policy
    from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

    config = make_config(vlm, size=256, **settings)
    dims = config.action_feature.shape[0]
    stats = {"action": {name: value[:dims] for name, value in make_stats()["action"].items()}}
    VLA0Policy(config).save_pretrained(folder)
    for processor in make_vla0_pre_post_processors(config, stats):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_vlm, tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("policy"), tiny_vlm)


def arguments(checkpoint: Path, out: Path) -> list[str]:
    return [
        "eval", f"--policy.path={checkpoint}", "--policy.device=cpu", "--suites=libero_object",
        "--tasks=[0,7]", "--episodes=3", "--max_episode_steps=6", "--assets=primitive", f"--out={out}",
    ]  # fmt: skip


@pytest.fixture
def quick(monkeypatch, checkpoint, throw_away, tmp_path):
    """Runs `lerobot-vla0 eval` in this process; returns its message if it fails."""
    monkeypatch.setattr(module, "EnvironmentPool", Pool)
    monkeypatch.setattr(Pool, "broken", False)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr("lerobot_vla0.libero.assets.find_library", lambda name: name)

    def run(*options: str, policy: Path = checkpoint, rank: tuple[int, int] = (0, 1)) -> str | None:
        monkeypatch.setenv("RANK", str(rank[0]))
        monkeypatch.setenv("WORLD_SIZE", str(rank[1]))
        given = (*arguments(policy, tmp_path / "out"), *options)
        options = {option.partition("=")[0]: option for option in given}
        try:
            cli.main(list(options.values()))
        except SystemExit as error:
            return error.code

    return run


def lines_of(folder: Path) -> list[str]:
    return [line for path in folder.glob("episodes-*") for line in path.read_text().splitlines()]


def test_a_run_that_fails_at_its_start_leaves_nothing(quick, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "file").write_text("")
    assert "tasks=[7, 7] must name" in quick("--tasks=[7,7]")
    assert "assets='/nowhere' is not" in quick("--assets=/nowhere")
    assert "holds no finished episode" in quick(f"--compare={tmp_path}/none")
    assert f"{tmp_path}/file" in quick(f"--out={tmp_path}/file/out")
    assert "model.safetensors" in quick(policy=broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"]
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
    # A line that a kill cut off is removed, and nothing else is written anew.
    path = tmp_path / "out/episodes-1of1.jsonl"
    before = path.read_text()
    path.write_text(before + '{"sui')
    inode = path.stat().st_ino
    assert len(read_episodes(tmp_path / "out")) == 2
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


def test_policy_for_another_robot(quick, tiny_vlm, tmp_path):
    front = {"observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 256, 256))}
    policy = make_checkpoint(tmp_path / "camera", tiny_vlm, input_features=front)
    assert "needs the cameras ['front']; LIBERO has ['image', 'image2']" in quick(policy=policy)
    six = {"action": PolicyFeature(FeatureType.ACTION, (6,))}
    policy = make_checkpoint(tmp_path / "action", tiny_vlm, output_features=six)
    assert "the policy's actions have 6 dimensions, LIBERO's have 7" in quick(policy=policy)


# As `env` shows them in a batch script of Slurm with --ntasks=4, which runs once; and in a task of srun.
SBATCH = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**SBATCH, "SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, None)),
        (TORCHRUN, (3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, None)),
        (SBATCH, (0, 1, None)),
        (SRUN, (2, 4, 0)),
        ({**SRUN, **TORCHRUN}, (3, 8, 1)),
    ],
)
def test_which_process_this_is(environ, expected):
    assert find_rank(environ) == expected


@pytest.mark.parametrize(
    ("device", "local", "gpus", "expected"),
    [
        ("cuda", 5, 4, "cuda:1"),  # more processes than GPUs
        ("cuda", 3, 1, "cuda"),  # srun --gpus-per-task=1
        ("cuda", None, 4, "cuda"),
        ("cuda:2", 1, 4, "cuda:2"),
        ("cpu", 1, 4, "cpu"),
    ],
)
def test_each_process_has_a_part_and_a_gpu(device, local, gpus, expected, monkeypatch):
    config, started = EvalConfig(out=Path("r")), []
    config.policy = make_config("vlm")
    config.policy.device = device
    monkeypatch.setattr(module, "evaluate", started.append)
    monkeypatch.setattr(module, "find_rank", lambda environ: (2, 9, local))
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: gpus)
    module.main(config)
    assert started == [config] and config.shard == "3/9" and config.policy.device == expected


def test_each_process_writes_the_report_of_what_is_there(quick, tmp_path):
    out = tmp_path / "out"
    assert "shard='1/2': leave it out" in quick("--shard=1/2", rank=(0, 2))
    Pool.broken = True
    assert "the environment died" in quick(rank=(1, 2))
    Pool.broken = False
    assert quick(rank=(0, 2)) is None
    text = (out / "report.md").read_text()
    assert "0/4 = 0.0 %" in text and "Unfinished: 4 of 6 episodes. Missing: 2 of part 2/2." in text
    assert quick(rank=(1, 2)) is None and "Unfinished" not in (out / "report.md").read_text()
    assert sorted(path.name for path in out.glob("episodes-*")) == [f"episodes-{k}of2.jsonl" for k in (1, 2)]
    for number in range(9):  # more processes than episodes
        assert quick(f"--out={tmp_path}/nine", rank=(number, 9)) is None
    assert "Unfinished" not in (tmp_path / "nine/report.md").read_text()


def row(suite="libero_object", task_id=0, episode=0, success=True, steps=100) -> dict:
    task = {"suite": suite, "task_id": task_id, "task": "pick up the milk", "episode": episode}
    return {**task, "init_state": episode, "success": success, "steps": steps}


def write(folder, rows) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "episodes-1of1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_wilson_at_known_values():
    # https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval, Wilson score interval, by hand
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson(1892, 2000)
    assert (high - low) / 2 == pytest.approx(0.01, abs=5e-4)  # ±1.0 at 2,000 episodes


def test_damage(tmp_path):
    with pytest.raises(ValueError, match="episodes-1of1.jsonl is damaged.*task_id"):
        read_episodes(write(tmp_path / "a", [row(), {"suite": "x"}, row(episode=1)]))
    with pytest.raises(ValueError, match="there twice, with different outcomes"):
        read_episodes(write(tmp_path / "b", [row(), row(success=False)]))


def test_report(tmp_path):
    rows = [row("libero_object", t, e, success=(t + e) % 4 != 0) for t in range(2) for e in range(4)]
    rows += [row("libero_goal", 3, e, success=False) for e in range(4)]
    folder = write(tmp_path / "r", rows)
    settings = {"stand_in_assets": True, "episodes_in_all": 16, "policy": {}}
    (folder / "settings.json").write_text(json.dumps(settings))
    text = write_report(folder, {"2/2": 4}).read_text()
    assert "these are not LIBERO scores" in text and "Unfinished: 12 of 16 episodes" in text
    assert "| libero_object | 0: pick up the milk | 3/4 = 75.0 % | 30.1–95.4 % | 100 |" in text
    assert "| **libero_object** | all | 6/8 = 75.0 %" in text and "| **all** | all | 6/12 = 50.0 %" in text
    assert "| libero_goal | 3: pick up the milk | 0/4 = 0.0 % | 0.0–49.0 % | – |" in text


def test_comparison_is_paired(tmp_path):
    one = write(tmp_path / "a", [row(episode=e, success=e < 7) for e in range(9)])
    two = write(tmp_path / "b", [row(episode=e, success=e < 2) for e in range(8)])
    text = compare(one, two)
    assert "8 episodes in common" in text and "both 2, only A 5, only B 0, neither 1" in text
    assert "p = 0.0625" in text  # McNemar: 2 / 2^5
    assert "p = 1" in compare(one, one)
    with pytest.raises(ValueError, match="no finished episode in common"):
        compare(one, tmp_path)


def outcomes(folder: Path) -> dict:
    return {key: (e["success"], e["steps"], e["init_state"]) for key, e in read_episodes(folder).items()}


def environments_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that the fork server has forked."""
    children = psutil.Process(process.pid).children()
    return next(child for child in children if "forkserver" in " ".join(child.cmdline())).children()


@pytest.fixture(scope="module")
def whole(checkpoint, process_env, tmp_path_factory) -> Path:
    """Results of one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_script("lerobot-vla0", *arguments(checkpoint, out), env=process_env)
    assert len(list((out / "videos").glob("*_failure.mp4"))) == 6
    assert {state for _, _, state in outcomes(out).values()} == {0, 1, 2}
    settings = json.loads((out / "settings.json").read_text())
    assert settings["stand_in_assets"] and settings["versions"]["lerobot"].startswith("0.6")
    return out


@pytest.mark.slow
def test_kill_and_resume_give_one_result(whole, checkpoint, process_env, tmp_path):
    script = str(Path(sys.executable).with_name("lerobot-vla0"))
    command = [script, *arguments(checkpoint, tmp_path / "killed"), "--batch_size=2"]
    log, lines = tmp_path / "log", tmp_path / "killed/episodes-1of1.jsonl"

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
    assert process.wait(timeout=60) == 1 and "died, maybe killed because memory was short" in log.read_text()
    process = start_and_wait(lines.read_text().count("\n") + 1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert 2 <= lines.read_text().count("\n") < 6
    resumed = run_script("lerobot-vla0", *command[1:], f"--compare={whole}", env=process_env).stdout
    assert outcomes(tmp_path / "killed") == outcomes(whole)
    assert lines.read_text().count("\n") == 6  # none lost, none run twice
    assert "6 episodes in common" in resumed and "p = 1" in resumed


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(whole, checkpoint, process_env, tmp_path):
    launcher = ["--standalone", "--nproc_per_node=2", "--no-python"]
    launcher.append(str(Path(sys.executable).with_name("lerobot-vla0")))
    log = run_script("torchrun", *launcher, *arguments(checkpoint, tmp_path / "out"), env=process_env).stdout
    assert outcomes(tmp_path / "out") == outcomes(whole), log
    assert [len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("episodes-*")] == [3, 3]
    tables = [(out / "report.md").read_text().split("## Settings")[0] for out in (tmp_path / "out", whole)]
    assert tables[0] == tables[1]
