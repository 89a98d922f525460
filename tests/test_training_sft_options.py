import os
import sys
from pathlib import Path

import pytest

from lerobot_vla0.cli import main
from lerobot_vla0.training.sft_options import parse

BASE = ["--use_cpu", "--dataset.repo_id=local/x", "--policy.vlm=some/vlm"]


def test_defaults_are_the_published_recipe():
    arguments = parse(BASE)
    training, policy = arguments.training, arguments.policy
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (4e-5, 1e-10, 1.0)
    assert training.lr_scheduler_type == "constant_with_warmup" and training.warmup_steps == 0
    assert training.max_length is None and not training.remove_unused_columns
    # On the CPU, everything in float32.
    assert (policy.dtype, policy.device, training.bf16, training.fp16) == ("float32", "cpu", False, False)
    assert policy.image_size == 224 and policy.action_mask_prob == 0.4


def test_command_line_over_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-5\nmax_steps: 7\nreport_to: [tensorboard]\n"
        "policy: {vlm: a/b, image_size: 56, cameras: [observation.images.top], dtype: bfloat16}\n"
        "dataset: {repo_id: local/x, episodes: [1, 2]}\n"
    )
    arguments = parse(
        [
            "--config",
            str(file),
            "--use_cpu",
            "--max_steps=9",
            "--policy.image_size",
            "84",
            "--learning-rate=2e-5",
        ]
    )
    training, policy = arguments.training, arguments.policy
    assert (training.learning_rate, training.max_steps, training.report_to) == (2e-5, 9, ["tensorboard"])
    assert (policy.vlm, policy.image_size, policy.cameras) == ("a/b", 84, ["observation.images.top"])
    assert arguments.dataset.episodes == [1, 2] and policy.dtype == "bfloat16" and not training.bf16


def test_nested_options_over_a_nested_mapping(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset: {repo_id: local/x, image_transforms: {enable: true, max_num_transforms: 2}}\n")
    arguments = parse([*BASE, f"--config={file}", "--dataset.image_transforms.max_num_transforms", "5"])
    transforms = arguments.dataset.image_transforms
    assert (transforms.enable, transforms.max_num_transforms) == (True, 5)


def test_environment_variables_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA0_TEST_VARIABLE", "before")
    file = tmp_path / "run.yaml"
    file.write_text("env: {VLA0_TEST_VARIABLE: 3}\n")
    parse([*BASE, f"--config={file}"])
    assert os.environ["VLA0_TEST_VARIABLE"] == "3"


def test_the_checkpoints_config_says_how_it_was_trained():
    arguments = parse(
        [*BASE, "--learning_rate=3e-6", "--max_grad_norm=0.5", "--push_to_hub", "--hub_model_id=me/policy"]
    )
    policy = arguments.policy
    assert (policy.optimizer_lr, policy.optimizer_grad_clip_norm, policy.repo_id) == (3e-6, 0.5, "me/policy")
    assert policy.push_to_hub and policy.gradient_checkpointing


def test_evaluation_defaults_to_the_suite_trained_on():
    arguments = parse(
        [*BASE, "--train_suite=libero_goal", "--eval_after_train", "--eval.episodes=3", "--eval.tasks=[1, 2]"]
    )
    evaluation = arguments.evaluation
    assert (evaluation.suites, evaluation.episodes, evaluation.tasks) == ("libero_goal", 3, [1, 2])
    assert evaluation.out == Path("outputs/sft/eval") and parse(BASE).evaluation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat=1"], "unknown option 'learning_rat'. The nearest is 'learning_rate'"),
        (["--policy.imagesize=56"], "unknown option 'policy.imagesize'. The nearest is 'policy.image_size'"),
        (["--dataset.repo=x"], "unknown option 'dataset.repo'. The nearest is 'dataset.repo_"),
        (["--polcy.image_size=56"], "unknown option 'polcy.image_size'. The nearest is 'policy"),
        (["--policy.image_size"], "--policy.image_size has no value"),
        (["--max_steps=1", "stray"], "'stray' is no option"),
        (["--policy.optimizer_lr=1"], "policy.optimizer_lr has no effect here: use --learning_rate"),
        (["--policy.device=cpu"], "policy.device has no effect here: use --use_cpu"),
        (["--packing"], "packing has no effect here"),
        (["--policy.type=act"], "policy.type='act': this trains vla0 only"),
        (["--policy.image_size=0"], "image_size=0 is not allowed"),
        (["--push_to_hub"], "push_to_hub needs a repo.*--hub_model_id"),
        (["--eval.episodes=3"], "eval.episodes has no effect without --eval_after_train"),
        (["--eval_after_train", "--eval.suites=libero_objekt"], "unknown LIBERO suite 'libero_objekt'"),
        (
            ["--eval_after_train", "--eval.policy.path=x"],
            "eval.policy has no effect here: the final checkpoint",
        ),
        (["--eval_after_train", "--eval.out=x"], "eval.out has no effect here: results go to"),
        (["--config", "nowhere.yaml"], "config='nowhere.yaml': there is no such file"),
        (["--lora_r=8"], "lora_r=8 has no effect without --use_lora"),
        (["--lora_target_modules", "q_proj"], r"lora_target_modules=\['q_proj'\] has no effect without"),
        (["--eval_steps=5"], "eval_steps has no effect here: nothing is evaluated before the end"),
        (
            ["--pad_to_multiple_of=8"],
            "pad_to_multiple_of has no effect here: examples are made by the policy",
        ),
        (["--dataset.return_uint8=true"], "dataset.return_uint8 has no effect here"),
        (["--rename_map=[a]"], r"rename_map='\[a\]' must be '{name in the data set: new name, ...}'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse([*BASE, *options])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning-rate: 1", "unknown option 'learning-rate' in .*run.yaml. The nearest is 'learning_rate'"),
        ("packing: true", "packing has no effect here"),
        ("policy: {device: cpu}", "policy.device has no effect here: use --use_cpu"),
        ("learning_rat: 1", "unknown option 'learning_rat' in .*run.yaml. The nearest is 'learning_rate'"),
        ("policy: {chunksize: 4}", "'policy.chunksize' in .*run.yaml. The nearest is 'policy.chunk_size'"),
        ("policy: vla0", "policy must be a mapping, got 'vla0'"),
        ("- 1", "must hold `option: value` lines"),
    ],
)
def test_bad_file(content, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse([*BASE, "--config", str(file)])


def test_no_data_set():
    with pytest.raises(ValueError, match=r"which data set\? --dataset.repo_id"):
        parse(["--use_cpu"])


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("lerobot_vla0.training", "lerobot_vla0.training.sft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    message = r"lerobot-vla0 sft: TRL is not installed: pip install 'lerobot_policy_vla0\[sft\]'"
    with pytest.raises(SystemExit, match=message):
        main(["sft", *BASE])


def test_help_lists_ours_trls_and_lerobots(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for text in ("--train_suite", "--policy.*", "image_size", "--dataset.*", "root", "--eval.*", "suites"):
        assert text in shown
    assert "--gradient_accumulation_steps" in shown and "--learning_rate  [4e-05]" in shown
    assert "optimizer_lr" not in shown and "--packing" not in shown
