"""Several processes that evaluate together: what they share, and what the first does about the others."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import make_config, make_stats, run_script

from lerobot_vla0.libero import ranks
from lerobot_vla0.libero.evaluate import EvalConfig
from lerobot_vla0.libero.ranks import Others, Rank, State, find_rank, own_device
from lerobot_vla0.libero.report import read_episodes
from lerobot_vla0.libero.results import save_episode
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

# As `env` shows them in a batch script of Slurm with --ntasks=4, which runs once; and in a task of srun.
SBATCH = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**SBATCH, "SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Rank()),
        ({"LOCAL_RANK": "3"}, Rank()),
        (TORCHRUN, Rank(3, 8, 1, "WORLD_SIZE=8")),
        ({"RANK": "0", "WORLD_SIZE": " 1 "}, Rank(0, 1, None, "WORLD_SIZE=1")),
        (SBATCH, Rank()),
        (SRUN, Rank(2, 4, 0, "SLURM_STEP_NUM_TASKS=4")),
        # One task of four was asked for; and an interactive shell is a step of one task.
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Rank(0, 1, 0, "SLURM_STEP_NUM_TASKS=1")),
        ({**SRUN, **TORCHRUN}, Rank(3, 8, 1, "WORLD_SIZE=8")),
    ],
)
def test_which_process_this_is(environ, expected):
    assert find_rank(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "RANK='1' is set, and WORLD_SIZE is not.*unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' is set, and RANK is not.*unset WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' must be an integer"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' must be an integer of at least 0"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' must be an integer"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 must be below WORLD_SIZE=0"),
        ({**TORCHRUN, "LOCAL_RANK": "a"}, "LOCAL_RANK='a' must be an integer"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 must be below SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS='4' is set, and SLURM_PROCID is not"),
    ],
)
def test_variables_that_do_not_fit(environ, message):
    with pytest.raises(ValueError, match=message):
        find_rank(environ)


@pytest.mark.parametrize(
    ("device", "local", "gpus", "expected"),
    [
        ("cuda", 1, 4, "cuda:1"),
        ("cuda", 5, 4, "cuda:1"),  # more processes than GPUs
        ("cuda", 3, 1, "cuda"),  # srun --gpus-per-task=1
        ("cuda", None, 4, "cuda"),
        ("cuda:2", 1, 4, "cuda:2"),
        ("cpu", 1, 4, "cpu"),
    ],
)
def test_each_process_has_a_gpu(device, local, gpus, expected):
    assert own_device(device, local, gpus) == expected


# ----------------------------------------------------------- without a policy and a simulator


def make_eval(out: Path, **settings) -> EvalConfig:
    config = EvalConfig(out=out, suites="libero_object", tasks=[0, 7], episodes=3, **settings)
    config.policy = make_config("vlm")
    return config


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs one process of `count`; its episodes take no time, and `fail` raises after the first one."""
    monkeypatch.setattr(ranks, "POLL_S", 0.02)
    monkeypatch.setattr(ranks, "BEAT_S", 0.0)

    def run_episodes(config, beat):
        beat()
        done = read_episodes(config.out)
        settings = {"stand_in_assets": True, "episodes_in_all": 6, "policy": {}}
        for number, job in enumerate(job for job in config.jobs(config.part, config.parts)):
            if job[:3] not in done:
                row = {**job._asdict(), "task": "pick up", "success": job.episode > 0, "steps": 9}
                save_episode(config.out, config.shard, settings, row)
            if fail.is_set() and number == 0:
                raise RuntimeError("the environment\ndied")

    fail = threading.Event()
    monkeypatch.setattr(ranks, "run_episodes", run_episodes)

    def run(number: int, count: int = 2, failing: bool = False, **settings):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        (fail.set if failing else fail.clear)()
        return ranks.evaluate(make_eval(tmp_path / "out", **settings))

    return run


def test_the_first_process_writes_the_report(quick, tmp_path, capsys):
    out = tmp_path / "out"
    assert quick(1) is None and not (out / "report.md").exists()
    assert "process 0 writes the report" in capsys.readouterr().out
    assert quick(0) == out / "report.md"
    assert "4/6 = 66.7 %" in (out / "report.md").read_text() and len(read_episodes(out)) == 6
    assert sorted(path.name for path in out.glob("episodes-*")) == [
        "episodes-1of2.jsonl",
        "episodes-2of2.jsonl",
    ]
    assert not (out / "ranks").exists()


def test_it_waits_until_the_others_are_done(quick, tmp_path):
    """Also after their last episode, while they make a video; and also if it has no episode itself."""
    config = make_eval(tmp_path / "out", rank_timeout=30.0)
    others, results = Others(config, 2), []
    thread = threading.Thread(target=lambda: results.append(others.wait()))
    thread.start()
    state = State(config.out, 1, 2)
    state.write("alive")
    for job in config.jobs(2, 2):
        time.sleep(0.05)
        assert thread.is_alive()
        row = {**job._asdict(), "task": "a", "success": True, "steps": 9}
        save_episode(config.out, "2/2", {"policy": {}}, row)
    time.sleep(0.1)
    assert thread.is_alive()
    state.write("done")
    thread.join(5)
    assert results == [None]


def test_more_processes_than_episodes(quick, tmp_path):
    assert [quick(number, 9) for number in range(1, 9)] == [None] * 8
    assert quick(0, 9) == tmp_path / "out/report.md" and len(read_episodes(tmp_path / "out")) == 6


def test_one_that_fails_ends_the_first_and_the_command_resumes(quick, tmp_path):
    out = tmp_path / "out"
    config = make_eval(out)
    others = Others(config, 2)  # before the other one fails
    with pytest.raises(RuntimeError, match="the environment"):
        quick(1, failing=True)
    assert others.wait() == (
        "process 1 of 0..1 failed (RuntimeError: the environment died). 2 of its 3 episodes are missing: the "
        "same command runs them."
    )
    # The first process of the next run does not take what is left of this one for news.
    with pytest.raises(
        RuntimeError, match=r"process 1 of 0..1 is lost: for 0.3 s .*earlier run: RuntimeError"
    ):
        quick(0, rank_timeout=0.3)
    assert "Unfinished: 4 of 6 episodes." in (out / "report.md").read_text()
    assert quick(1) is None and quick(0) == out / "report.md"
    assert "Unfinished" not in (out / "report.md").read_text()


def test_one_that_never_begins_is_not_waited_for_for_ever(quick, tmp_path):
    with pytest.raises(RuntimeError, match=r"process 1 of 0..1 is lost.*all machines must share. 3 of its 3"):
        quick(0, rank_timeout=0.3)
    assert len(read_episodes(tmp_path / "out")) == 3


def test_one_that_is_alive_is_waited_for(quick, tmp_path):
    config = make_eval(tmp_path / "out", rank_timeout=0.5)
    others, state, results = Others(config, 2), State(config.out, 1, 2), []
    thread = threading.Thread(target=lambda: results.append(others.wait()))
    thread.start()
    for _ in range(10):
        time.sleep(0.1)
        state.alive()
    assert thread.is_alive()
    thread.join(5)
    assert "is lost: for 0.5 s" in results[0]


def test_a_run_that_fails_at_its_start_leaves_nothing(quick, monkeypatch, tmp_path):
    """Settings are checked before the first sign of life."""

    def refuse(config, beat):
        raise ValueError("no such policy")

    monkeypatch.setattr(ranks, "run_episodes", refuse)
    for number in (0, 1):
        with pytest.raises(ValueError, match="no such policy"):
            quick(number)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["1/1", "3/10"])
def test_a_part_for_all_is_refused(shard, quick, tmp_path):
    with pytest.raises(ValueError, match=f"shard='{shard}' was given to 2 processes .WORLD_SIZE=2"):
        quick(0, shard=shard)
    assert not (tmp_path / "out").exists()


def test_one_process_of_a_launcher_is_as_none(monkeypatch, tmp_path):
    alone = []
    monkeypatch.setattr(ranks, "evaluate_alone", alone.append)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = make_eval(tmp_path / "out", shard="3/10")
    ranks.evaluate(config)
    assert alone == [config] and config.part == 3


def test_a_timeout_that_is_none():
    for value in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="rank_timeout=.* must be above 0"):
            EvalConfig(out=Path("r"), rank_timeout=value)


# ------------------------------------------------------------------ real processes, in the simulation


@pytest.fixture(scope="module")
def checkpoint(tiny_vlm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    config = make_config(tiny_vlm, size=256)
    VLA0Policy(config).save_pretrained(folder)
    for processor in make_vla0_pre_post_processors(config, make_stats()):
        processor.save_pretrained(folder)
    return folder


def outcomes(folder: Path) -> dict:
    return {key: (e["success"], e["steps"], e["init_state"]) for key, e in read_episodes(folder).items()}


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(checkpoint, process_env, tmp_path):
    """Started by torchrun; and by hand, where one is killed and the command is given again."""
    arguments = [
        "eval", f"--policy.path={checkpoint}", "--policy.device=cpu", "--suites=libero_object",
        "--tasks=[0,7]", "--episodes=2", "--max_episode_steps=6", "--assets=primitive",
    ]  # fmt: skip
    log = run_script(
        "lerobot-vla0", *arguments, f"--out={tmp_path / 'one'}", "--videos=none", env=process_env
    ).stdout
    expected = outcomes(tmp_path / "one")
    assert len(expected) == 4, log

    script = str(Path(sys.executable).with_name("lerobot-vla0"))
    out = tmp_path / "torchrun"
    launcher = ["--standalone", "--nproc_per_node=2", "--no-python", script]
    log = run_script("torchrun", *launcher, *arguments, f"--out={out}", env=process_env).stdout
    assert outcomes(out) == expected
    assert {path.name: len(path.read_text().splitlines()) for path in out.glob("episodes-*")} == {
        "episodes-1of2.jsonl": 2,
        "episodes-2of2.jsonl": 2,
    }
    assert (
        log.count(f"Wrote {out / 'report.md'}") == 1 and "Unfinished" not in (out / "report.md").read_text()
    )
    assert len(list((out / "videos").glob("*.mp4"))) == 4 and not (out / "ranks").exists()
    table = (out / "report.md").read_text().split("## Settings")[0]
    assert table == (tmp_path / "one/report.md").read_text().split("## Settings")[0]

    out, lines = tmp_path / "by_hand", tmp_path / "by_hand/episodes-2of2.jsonl"

    def start(number: int, rank_timeout: int) -> subprocess.Popen:
        command = [script, *arguments, f"--out={out}", f"--rank_timeout={rank_timeout}", "--videos=none"]
        env = {**process_env, "RANK": str(number), "WORLD_SIZE": "2"}
        with (tmp_path / f"{number}.log").open("a") as file:
            return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)

    first, second = start(0, 20), start(1, 20)
    while not lines.is_file():
        assert second.poll() is None, (tmp_path / "1.log").read_text()
        time.sleep(0.1)
    second.kill()
    second.wait()
    assert first.wait(600) == 1
    log = (tmp_path / "0.log").read_text()
    assert "lerobot-vla0 eval: process 1 of 0..1 is lost" in log and "1 of its 2 episodes are missing" in log
    assert "Unfinished: 3 of 4 episodes." in (out / "report.md").read_text()
    processes = [start(number, 600) for number in (0, 1)]
    assert [process.wait(600) for process in processes] == [0, 0], (tmp_path / "0.log").read_text()
    assert outcomes(out) == expected and lines.read_text().count("\n") == 2
    assert "Unfinished" not in (out / "report.md").read_text()
