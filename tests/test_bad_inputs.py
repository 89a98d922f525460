# ruff: noqa: E501 (rows of a table)
"""What a user can do wrong: every command ends with one message that names it and exit status 1, without a
traceback, and writes nothing."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from conftest import make_act, make_config, make_stats
from transformers import AutoModelForImageTextToText, AutoProcessor

from lerobot_vla0.cli import COMMANDS, main
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("libero", reason="LIBERO is not installed")

NVLABS = {
    "EXP": {"MODEL": "qwen"},
    "MODEL": {
        "QWEN": {
            "action_type": "original", "original_action_dim": 7, "horizon": 8, "history": 1, "num_cam": 2,
            "qwen_model_id": "Qwen/Qwen2.5-VL-3B-Instruct", "use_lora": False, "use_qlora": False,
            "rgb_input": True, "rgb_img_size": [224, 224], "add_vision_id": False, "tiled_rgb_imgs": True,
            "num_bins_actions": 1000, "action_mask_aug_per": 0.4,
        }
    },
    "DATALOADER": {"ROBOVERSE": {"cfg_path": "img_libero_aug.yaml", "cfg_opts": "IMAGE.crop_img:0.875"}},
}  # fmt: skip
STATS = {"out_ori_act": {"min": [-1.0] * 7, "max": [1.0] * 7}}
SETTINGS = {
    "stand_in_assets": False, "episodes": 1, "first_init_state": 0, "image_size": 256, "episodes_in_all": 1,
    "policy": {"n_action_steps": 8, "ensemble_size": 1}, "assets": ["real"],
}  # fmt: skip
EPISODE = {"suite": "libero_goal", "task_id": 0, "task": "a", "episode": 0, "success": True, "steps": 9}
LOG = "INFO step:200 smpl:2K ep:5 epch:0.59 loss:0.690 grdn:1.7\n"


@pytest.fixture(scope="module")
def world(tiny_vlm, tiny_dataset, tmp_path_factory) -> Path:
    """Folders that are right; tests damage copies of them."""
    root = tmp_path_factory.mktemp("world")
    policy = VLA0Policy(make_config(tiny_vlm))
    for part in (policy, *make_vla0_pre_post_processors(policy.config, make_stats())):
        part.save_pretrained(root / "checkpoint")
    main(["export", f"--policy.path={root}/checkpoint", f"--out={root}/exported"])
    make_act(root / "act")
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm)
    processor = AutoProcessor.from_pretrained(tiny_vlm, min_pixels=224 * 448, max_pixels=224 * 448)
    for folder in ("trl/final", "nvlabs/model_last"):
        model.save_pretrained(root / folder)
        processor.save_pretrained(root / folder)
    for folder in ("trl", "nvlabs"):
        (root / folder / "dataset_stats.json").write_text(json.dumps(STATS))
    (root / "nvlabs/config.yaml").write_text(yaml.safe_dump(NVLABS))
    (root / "results").mkdir()
    (root / "results/settings.json").write_text(json.dumps(SETTINGS))
    (root / "results/episodes-1of1.jsonl").write_text(json.dumps(EPISODE) + "\n")
    (root / "train.log").write_text(LOG)
    (root / "run.yaml").write_text("policy: {image_size: 56}\n")
    (root / "empty").mkdir()
    (root / "vlm").symlink_to(tiny_vlm)
    (root / "data").symlink_to(tiny_dataset)
    before = snapshot(root, tiny_vlm, tiny_dataset)
    yield root
    assert snapshot(root, tiny_vlm, tiny_dataset) == before


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time of the last change)} of all files; of folders only their names, because a check may
    have written into them and removed what it wrote."""
    found = {}
    for top in folders:
        for folder, _, files in os.walk(top):
            found[folder] = (0, 0)
            for name in files:
                status = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
    return found


# Damage: (the folder or file that is copied to `bad`, the file in it, its new content; None removes it).
Damage = tuple[str, str, str | bytes | dict | list | Callable | None]


def damage(world: Path, source: str, name: str, content: str | bytes | dict | list | Callable | None) -> None:
    origin = (world / source).resolve()
    if origin.is_file():
        shutil.copyfile(origin, "bad")
        file = Path("bad")
    else:
        shutil.copytree(origin, "bad")
        file = Path("bad", name)
    if content is None:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif callable(content):
        saved = json.loads(file.read_text())
        content(saved)
        file.write_text(json.dumps(saved))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))


def without(*path: str) -> Callable:
    """Removes a field."""

    def change(saved: dict) -> None:
        for name in path[:-1]:
            saved = saved[name]
        del saved[path[-1]]

    return change


def with_(value: object, *path: str) -> Callable:
    """Sets a field."""

    def change(saved: dict) -> None:
        for name in path[:-1]:
            saved = saved[name]
        saved[path[-1]] = value

    return change


POLICY = "--policy.path=checkpoint"
BAD = "--policy.path=bad"
SFT = "sft --use_cpu --dataset.repo_id=local/x --dataset.root=data --policy.vlm=vlm --policy.image_size=56"
RECORD = "record --out=out --assets=primitive"
IMPORT = "import --from=bad --out=out"
DECODE = "bench decode --model=checkpoint --dataset=data --out=out"
CONFIG = "checkpoint", "config.json"
SPEC = "exported", "action_spec.json"
YAML = "nvlabs", "config.yaml"

# Options without which a command does not look at the others.
NEEDED = {"import": "--from=trl --out=out", "sft": "--max_steps=1", "curve": "--log=train.log"}

# How each command names its place, and of which kind that is.
PLACES = {
    "new folder": [
        "record --assets=primitive --out=", "tiny-vlm --out=", f"merge {POLICY} --out=",
        f"export {POLICY} --out=", "import --from=trl --out=",
    ],
    "folder": ["bench train --out=", "bench decode --model=checkpoint --dataset=data --out=", f"{SFT} --output_dir="],
    "file": ["curve --log=train.log --out=", f"strip {POLICY} --out="],
}  # fmt: skip
BAD_PLACES = {
    "new folder": {
        ".": "is the working directory", "file.png": "is there and is no folder", "link": "is a symbolic link",
        "gone.png": "is there and is no folder", "full": "exists and is not empty",
        "file.png/out": "is no folder", "/proc/out": "cannot be written",
    },
    "folder": {
        "file.png": "is there and is no folder", "gone.png": "is there and is no folder",
        "file.png/out": "is no folder", "/proc/out": "cannot be written",
    },
    "file": {
        "full": "no plain file|must end with", "gone.png": "is there and is no plain file",
        "folder.png": "is there and is no plain file", "file.png/x.png": "is no folder",
        "/proc/x.png": "cannot be written", "x.unknown": "must end with", "x": "must end with",
    },
}  # fmt: skip
Case = tuple[str, str] | tuple[str, str, Damage]
CASES: list[Case] = [
    (f"{command}{place}", f"(out|output_dir)='{place}.*({message})")
    for kind, commands in PLACES.items()
    for command in commands
    for place, message in BAD_PLACES[kind].items()
]
CASES += [
    # What every command has.
    *((f"{name} --frobnicate=1 {NEEDED.get(name, '--out=out')}", "frobnicate") for name in COMMANDS),
    *((f"{name} stray {NEEDED.get(name, '--out=out')}", "stray") for name in COMMANDS),
    *(
        (f"{name} --policy.path=/nonexistent/x --out=out.png", "'/nonexistent/x' is.* no(t a| such)? folder")
        for name in ("eval", "merge", "export", "card", "strip")
    ),
    *(
        (f"{name} --out=out.png", "which .*--policy.path=|the card of which")
        for name in ("eval", "merge", "export", "card", "strip")
    ),
    # record
    ("record", "out"),
    *(
        (f"{RECORD} {option}", message)
        for option, message in [
            ("--episodes=0", "episodes=0"), ("--episodes=few", "'few' into an int"), ("--tasks=[]", r"tasks=\[\]"),
            ("--tasks=[10]", r"0..9, not \[10\]"), ("--tasks=[-1]", r"not \[-1\]"), ("--tasks=x", "tasks"),
            ("--tasks=[7,7]", r"tasks=\[7, 7\] must name at least one task, and each once"), ("--init_states=0", "init_states=0"),
            ("--init_states=51", "init_states=51"), ("--noise=-0.1", "noise=-0.1"), ("--noise=nan", "noise=nan"),
            ("--noise=inf", "noise=inf"), ("--noise=much", "'much'"), ("--workers=0", "workers=0"),
            ("--seed=-1", "seed=-1"), ("--seed=1.5", "1.5"), ("--image_size=0", "image_size=0"),
            ("--image_size=-5", "image_size=-5"), ("--image_size=1000000000", "image_size=1000000000"),
            ("--image_size=65 --video=true", "image_size=65"), ("--video=maybe", "maybe"),
            ("--suite=libero_objects", "'libero_objects'"), ("--suite=libero_goal", "not for libero_goal"),
            ("--assets=nowhere", "assets='nowhere'"),
        ]
    ),
    # tiny-vlm
    *(
        (f"tiny-vlm --out=out {option}", message)
        for option, message in [
            ("--hidden_size=100", "hidden_size=100"), ("--hidden_size=0", "hidden_size=0"),
            ("--num_heads=0", "num_heads=0"), ("--num_heads=-4", "num_heads=-4"), ("--num_layers=0", "num_layers=0"),
            ("--vision_layers=0", "vision_layers=0"), ("--vision_hidden_size=0", "vision_hidden_size=0"),
            ("--vocab_size=10", "vocab_size=10"),
            ("--seed=x", "'x'"), ("--seed=99999999999999999999", "seed=99999999999999999999"),
        ]
    ),
    # curve
    ("curve --out=x.png", "log"),
    ("curve --log=nowhere --out=x.png", "log='nowhere' is no file: give what lerobot-train printed"),
    ("curve --log=empty --out=x.png", "empty"),
    ("curve --log=bad --out=x.png", "log='bad' has no line", ("train.log", "", "nothing")),
    ("curve --log=bad --out=x.png", "log='bad' has no line", ("train.log", "", b"\xff\x00")),
    ("curve --log=bad --out=x.png", "begins at step 2K", ("train.log", "", LOG.replace("200", "2K"))),
    ("curve --log=bad --out=x.png", "log='bad'.*'x.7'", ("train.log", "", LOG.replace("0.690", "x.7"))),
    # strip
    *(
        (f"strip {POLICY} --out=x.png {option}", message)
        for option, message in [
            ("--frames=1", "frames=1"), ("--frames=0", "frames=0"), ("--suite=libero", "'libero'"),
            ("--task=10", r"not \[10\]"), ("--task=-1", r"not \[-1\]"), ("--init_state=50", "init_state=50"),
            ("--init_state=-1", "init_state=-1"), ("--image_size=0", "image_size=0"), ("--assets=nowhere", "assets='nowhere'"),
            ("--suite=libero_goal", "not for libero_goal"), ("--policy.chunk_size=0", "chunk_size=0"),
            ("--log=nowhere", "log='nowhere' is no file: give what lerobot-train printed"),
            ("--log=full", "log='full' is no file"), ("--reports=", "reports='' must name results folders"),
            ("--reports=full,full", "reports='full,full' must name results folders"),
            ("--reports=full", "reports='full' holds no finished episode: give the --out of `lerobot-vla0 eval`"),
            ("--reports=nowhere", "reports='nowhere' is no folder: give the --out of `lerobot-vla0 eval`"),
        ]
    ),
    (f"strip {POLICY} --out=x.png --log=bad", "log='bad' has no line.*: give what", ("train.log", "", "nothing")),
    # eval: its own settings (more in test_libero_evaluate.py)
    *(
        (f"eval {POLICY} --out=out --assets=primitive --suites=libero_object {option}", message)
        for option, message in [
            ("--suites=libero_objekt", "'libero_objekt'"), ("--tasks=[10]", r"not \[10\]"), ("--shard=0/1", "shard='0/1'"),
            ("--shard=2/1", "shard='2/1'"), ("--videos=some", "videos='some'"), ("--episodes=0", "episodes=0"),
            ("--episodes=51", "episodes=51"), ("--first_init_state=50", "first_init_state=50"),
            ("--batch_size=0", "batch_size=0"), ("--policy.num_bins=0", "num_bins=0"),
        ]
    ),
    (f"eval {POLICY}", "out"),
    # The config of a checkpoint.
    *(
        (f"{command} {BAD} --out=out", message, ("checkpoint", "config.json", content))
        for command in ("merge", "export", "card")
        for content, message in [
            ("", "config.json is damaged"), ("[1]", "config.json is damaged.*list"), (b"\xff", "config.json is damaged"),
            (with_("x", "chunk_size"), "chunk_size.*'x'"), (with_(0, "num_bins"), "num_bins=0"),
            (with_(1, "unknown"), "unknown"), (with_([1], "input_features"), "input_features"),
            (with_({"a": {"type": "VISUAL"}}, "input_features"), "input_features|shape"),
            (with_({"a": 3}, "output_features"), "output_features"), (None, "config.json"),
        ]
    ),
    # merge, export
    (f"merge {POLICY} --out=out", "checkpoint is no adapter"),
    (f"merge {BAD} --out=out", "bad", ("checkpoint", "adapter_config.json", "")),
    (f"export {BAD} --out=out", "bad is an adapter", ("checkpoint", "adapter_config.json", "{}")),
    *(
        (f"export {BAD} --out=out", message, ("checkpoint", name, content))
        for name, content, message in [
            ("model.safetensors", None, "model.safetensors is missing"), ("model.safetensors", "", "model.safetensors"),
            ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "model.safetensors"),
            ("vlm", None, "vlm/config.json is missing"), ("vlm/config.json", "", "vlm"),
            ("vlm/config.json", "{}", "vlm"), ("vlm/config.json", "[]", "vlm"),
            ("vlm/config.json", with_("bert", "model_type"), "bert"),
            ("vlm/config.json", with_("many", "text_config", "num_hidden_layers"), "num_hidden_layers"),
            ("vlm/tokenizer.json", None, "vlm"), ("vlm/tokenizer.json", "", "vlm"), ("vlm/tokenizer.json", "{}", "vlm"),
            ("vlm/processor_config.json", "[", "vlm"),
            ("policy_postprocessor.json", "", "policy_postprocessor.json is damaged"),
            ("policy_postprocessor.json", "{}", "policy_postprocessor.json is damaged: the field 'steps'"),
            ("policy_postprocessor.json", '{"steps": 3}', "policy_postprocessor.json is damaged"),
            ("policy_postprocessor.json", '{"steps": [3]}', "policy_postprocessor.json is damaged"),
            ("policy_postprocessor_step_1_unnormalizer_processor.safetensors", None, "unnormalizer.* is missing"),
            ("policy_postprocessor_step_1_unnormalizer_processor.safetensors", "", "unnormalizer"),
        ]
    ),
    # card
    ("card --policy.path=no/repo --out=out", "no/repo.*hf download"),
    (f"card {POLICY} --results=nowhere --out=out", "results='nowhere'"),
    (f"card {POLICY} --results=empty --out=out", "results='empty'"),
    (f"card {POLICY} --out=file.png", "file.png is no folder"),
    *(
        (f"card {POLICY} --out=out --results=bad", message, ("results", name, content))
        for name, content, message in [
            ("settings.json", "", "settings.json is damaged"), ("settings.json", "3", "settings.json is damaged"),
            ("settings.json", without("policy"), "bad is damaged: the field 'policy'"),
            ("settings.json", with_(3, "policy"), "bad is damaged"), ("settings.json", b"\xff", "settings.json is damaged"),
            ("episodes-1of1.jsonl", "", "no finished episode"), ("episodes-1of1.jsonl", "{}\n", "line 1 is damaged"),
            ("episodes-1of1.jsonl", "x\n", "line 1 is damaged"), ("episodes-1of1.jsonl", b"\xff\n", "bad is damaged|jsonl"),
            ("episodes-1of1.jsonl", without("success"), "line 1 is damaged|bad is damaged|no finished"),
        ]
    ),
    *(
        (f"card {BAD}", message, ("checkpoint", name, content))
        for name, content, message in [
            ("train_config.json", "", "train_config.json is damaged"),
            ("train_config.json", '{"dataset": "x"}', "train_config.json is damaged: dataset is 'x'"),
            ("README.md", b"\xff\xfe", "README.md is damaged"),
            ("policy_postprocessor_step_1_unnormalizer_processor.safetensors", "", "unnormalizer"),
        ]
    ),
    # import
    ("import --out=out", "--from"),
    ("import --from=trl", "--out"),
    ("import --from=/nonexistent/x --out=out", "--from='/nonexistent/x' .*no such folder"),
    ("import --from=file.png --out=out", "--from='file.png' .*it is a file"),
    ("import --from=nowhere.pth --out=out", "--from='nowhere.pth'"),
    ("import --from=empty --out=out", "holds no model"),
    ("import --from=act --out=out", "'act'"),
    ("import --from=checkpoint --out=out", "'vla0'"),
    *(
        (f"import --from=trl --out=out {option}", message)
        for option, message in [
            ("--cameras=image", "--cameras='image'"), ("--cameras='[1, 2]'", r"--cameras=\[1, 2\]"),
            ("--cameras='[unclosed'", "cameras"), ("--add_vision_id=perhaps", "--add_vision_id='perhaps'"),
            ("--chunk_size=many", "chunk_size"), ("--chunk_size=-1", "chunk_size=-1"), ("--num_bins=1", "num_bins=1"),
            ("--image_size=100", "image_size"), ("--crop_ratio=2", "crop_ratio=2"), ("--stats=nowhere", "--stats='nowhere'"),
            ("--base=vlm", "--base='vlm' does not apply"), ("--data_config=nowhere", "--data_config='nowhere'"),
        ]
    ),
    *(
        (IMPORT, message, ("trl", name, content))
        for name, content, message in [
            ("dataset_stats.json", None, "dataset_stats.json is missing"), ("dataset_stats.json", "", "is no JSON"),
            ("dataset_stats.json", "[]", "expected .*out_ori_act"), ("dataset_stats.json", '{"out_ori_act": 3}', "out_ori_act"),
            ("dataset_stats.json", '{"out_ori_act": {"min": [1], "max": [0]}}', "min not above max"),
            ("dataset_stats.json", '{"out_ori_act": {"min": "a", "max": "b"}}', "lists of numbers"),
            ("dataset_stats.json", '{"out_ori_act": {"min": [NaN], "max": [0]}}', "finite"),
            ("dataset_stats.json", b"\xff", "dataset_stats.json"),
            ("final/config.json", "", "final/config.json is damaged"), ("final/config.json", "[]", "final/config.json is damaged"),
            ("final/config.json", "{}", "no config of a Transformers model"),
            ("final/config.json", with_("bert", "model_type"), "bert"),
            ("final/model.safetensors", None, "model.safetensors"), ("final/model.safetensors", "", "model.safetensors"),
            ("final/model.safetensors.index.json", "{}", "index.json is damaged: the field 'weight_map'"),
            ("final/model.safetensors.index.json", "[", "index.json is damaged"),
            ("final/model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
            ("final/tokenizer.json", None, "final"), ("final/tokenizer.json", "[", "final"),
            ("final/adapter_config.json", "", "adapter_config.json is damaged"),
            ("final/adapter_config.json", "{}", "adapter_config.json does not name the model"),
        ]
    ),
    *(
        (IMPORT, message, (*YAML, content))
        for content, message in [
            ("", "config.yaml is no config"), ("[", "config.yaml is no config"), ("- 1", "config.yaml is no config"),
            (b"\xff\xfe\xff", "config.yaml is no config"), (NVLABS | {"MODEL": {}}, "QWEN"),
            (NVLABS | {"EXP": {"MODEL": "pi0"}}, "EXP.MODEL is 'pi0'"),
            (NVLABS | {"MODEL": {"QWEN": NVLABS["MODEL"]["QWEN"] | {"horizon": "x"}}}, "horizon is 'x'"),
            (NVLABS | {"MODEL": {"QWEN": NVLABS["MODEL"]["QWEN"] | {"new": 1}}}, "MODEL.QWEN.new is 1"),
            (NVLABS | {"MODEL": {"QWEN": NVLABS["MODEL"]["QWEN"] | {"rgb_img_size": 3}}}, "config.yaml"),
            (NVLABS | {"DATALOADER": {"ROBOVERSE": {"cfg_path": "a", "cfg_opts": "b"}}}, "cfg_opts='b'"),
        ]
    ),
    ("import --from=nvlabs --out=out --data_config=bad", "bad is damaged", ("run.yaml", "", "- 1")),
    ("import --from=nvlabs --out=out --data_config=bad", "bad is damaged", ("run.yaml", "", b"\xff\xfe\xff")),
    *(
        (IMPORT, f"action_spec.json.*{message}", (*SPEC, content))
        for content, message in [
            ("", "damaged"), ("[]", "damaged"), (without("spec_version"), "'spec_version' is missing"),
            (with_(9, "spec_version"), "spec_version 9"), (with_("x", "spec_version"), "damaged"),
            (without("checkpoint"), "'checkpoint' is missing"), (without("checkpoint", "files"), "'files' is missing"),
            (with_([], "checkpoint", "files"), "damaged"), (with_(3, "checkpoint", "state"), "damaged"),
            (with_({"policy_a.safetensors": {"b": {}}}, "checkpoint", "state"), "damaged: the field 'dtype' is missing"),
            (with_({"policy_a.safetensors": {"b": {"values": [1], "dtype": "x"}}}, "checkpoint", "state"), "'x', which is no type of numbers"),
        ]
    ),
    # sft
    ("sft --use_cpu", "which data set"),
    *(
        (f"{SFT} {option}", message)
        for option, message in [
            ("--learning_rat=1", "'learning_rate'"), ("--learning_rate=fast", "learning_rate"), ("--max_steps=x", "max_steps"),
            ("--policy.path=/nonexistent/x", "'/nonexistent/x' .*no such folder"), ("--policy.image_size=0", "image_size=0"),
            ("--policy.device=cpu", "policy.device"), ("--max_episodes=0", "max_episodes=0"), ("--lora_r=8", "lora_r=8"),
            ("--train_suite=libero", "train_suite='libero'"), ("--rename_map=[a]", "rename_map"), ("--packing", "packing"),
            ("--rename_map={a", "rename_map"), ("--policy.image_size", "policy.image_size has no value"),
            ("--config=nowhere.yaml", "config='nowhere.yaml'"), ("--resume_from_checkpoint=true", "resume_from_checkpoint"),
            ("--resume_from_checkpoint=nowhere", "'nowhere' is no complete checkpoint"),
            ("--eval.episodes=3", "eval.episodes"), ("--eval_after_train --eval.suites=x", "'x'"),
            ("--dataset.root=nowhere", "dataset.root='nowhere'"), ("--dataset.root=file.png", "dataset.root='file.png'"),
            ("--dataset.root=empty", "dataset.root='empty'"), ("--policy.vlm=/nonexistent/x", "/nonexistent/x"),
            ("--policy.vlm=empty", "empty"), ("--dataset.episodes=[99]", "99"),
        ]
    ),
    *(
        (f"{SFT} --config=bad", message, ("run.yaml", "", content))
        for content, message in [
            ("", "bad must hold"), ("- 1", "bad must hold"), ("a: [", "bad is damaged"), (b"\xff\xfe\xff", "bad is damaged"),
            ("1: 2", "bad must hold"), ("policy: 3", "policy must be a mapping"), ("policy: {1: 2}", "policy must be"),
            ("env: [1]", "env must be a mapping"), ("env: {'a=b': 1}", "env"),
            ("learning_rat: 1", "'learning_rate'"), ("learning_rate: fast", "learning_rate"),
        ]
    ),
    *(
        (f"{SFT} --dataset.root=bad", message, ("data", name, content))
        for name, content, message in [
            ("meta/info.json", "", "dataset.root=.bad"), ("meta/info.json", "[]", "dataset.root=.bad"),
            ("meta/info.json", without("features"), "dataset.root=.bad"),
            ("meta/info.json", with_(3, "features"), "dataset.root=.bad"), ("meta/info.json", b"\xff", "dataset.root=.bad"),
            ("meta/stats.json", "[", "dataset.root=.bad"), ("meta/tasks.parquet", "x", "dataset.root=.bad"),
            ("meta/tasks.parquet", None, "dataset.root=.bad"),
        ]
    ),
    # bench
    *(
        (f"bench train --out=out {option}", message)
        for option, message in [
            ("--batch_size=0", "batch_size=0"), ("--steps=0", "steps=0"), ("--repeats=0", "repeats=0"),
            ("--modes=[fast]", "'fast'"), ("--modes=[]", r"modes=\[\]"), ("--model=huge", "model='huge'"),
            ("--dtype=float8", "dtype='float8'"), ("--device=tpu", "device='tpu'"), ("--seed=-1", "seed=-1"),
        ]
    ),
    *(
        (f"{DECODE} {option}", message)
        for option, message in [
            ("--batch_size=0", "batch_size=0"), ("--chunks=0", "chunks=0"), ("--repeats=-1", "repeats=-1"),
            ("--modes=[fast]", "'fast'"), ("--workloads=[x]", "'x'"), ("--workloads=[uniform]", "'uniform'"),
            ("--model=nowhere", "model='nowhere'"), ("--model=act", "'act'"), ("--dataset=nowhere", "nowhere"),
            ("--draft_length=64", "draft_length=64"), ("--dtype=float8", "dtype='float8'"), ("--modes=[]", r"modes=\[\]"),
            ("--device=tpu", "device='tpu'"), ("--seed=-1", "seed=-1"),
        ]
    ),
    ("bench decode --model=checkpoint --out=out", "--dataset="),
    ("bench decode --model=small-random --workloads=[replanned] --out=out", "'replanned'"),
]  # fmt: skip


@pytest.fixture
def place(world, tmp_path, monkeypatch, tmp_path_factory) -> Path:
    """A working directory with the world in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    for path in world.iterdir():
        os.symlink(path, path.name)
    for name in ("full/file", "file.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    os.symlink("nothing", "gone.png")
    os.symlink(world / "empty", "link")
    os.mkdir("folder.png")
    return tmp_path


def ends(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    if isinstance(stop.value.code, str):  # Python prints it and exits with 1
        return stop.value.code
    assert stop.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


# Numbers in front, because damage has no name, and must be the same in all processes of pytest-xdist.
@pytest.mark.parametrize("case", CASES, ids=[f"{i} {case[0]}"[:100] for i, case in enumerate(CASES)])
def test_ends_with_a_message_and_writes_nothing(case, place, world, capsys):
    command, message, *damages = case
    for damaged in damages:
        damage(world, *damaged)
    before = snapshot(place)
    shown = ends(shlex.split(command), capsys)
    name = next(n for n in COMMANDS if command.startswith(n))
    assert shown.startswith(f"lerobot-vla0 {name}: ") and re.search(message, shown), shown
    assert snapshot(place) == before


def test_there_are_enough():
    assert len(CASES) >= 150


def test_rendering_library_that_does_not_exist(place, monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_GL", "gpu")
    monkeypatch.delitem(sys.modules, "robosuite", raising=False)  # read once, when that is imported
    assert "MUJOCO_GL=gpu renders nothing. Set it to egl or osmesa" in ends(shlex.split(RECORD), capsys)
    assert not Path("out").exists()


def test_mistakes_of_the_program_keep_their_traceback(place, monkeypatch):
    """Only in files of users, a missing field or a wrong type is the user's mistake."""
    for error in (
        KeyError("a"),
        TypeError("b"),
        AttributeError("c"),
        NotImplementedError("d"),
        AssertionError(),
    ):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr("lerobot_vla0.demo.curve.read_log", fail)
        with pytest.raises(type(error)):
            main(["curve", "--log=train.log", "--out=x.png"])
    assert not Path("x.png").exists()
