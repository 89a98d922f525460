"""Pushes and downloads with LeRobot's and huggingface_hub's own code, in processes of their own, against a
local stand-in for the Hub."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_config, observation, randomise, run_script
from lerobot.policies.factory import make_pre_post_processors
from local_hub import TOKEN, LocalHub
from peers import save_model, write_config, write_stats

from lerobot_vla0.cli import main
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot_vla0.processor_vla0 import make_vla0_pre_post_processors

CHECKPOINT = {
    "README.md", "config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json",
    "train_config.json", "vlm/chat_template.json", "vlm/config.json", "vlm/tokenizer.json",
    "vlm/tokenizer_config.json",
}  # fmt: skip
# In a process of its own: the Hub's client reads its environment when it is imported. All that a process can
# do is done in one, because most of its time is imports.
LOAD = """
import json, sys, torch
from lerobot_vla0.cli import main
from lerobot_vla0.modeling_vla0 import VLA0Policy
from lerobot.policies.factory import make_pre_post_processors
loads, batch = json.loads(sys.argv[1]), torch.load(sys.argv[2])
if sys.argv[4:]:
    main(sys.argv[4:])
for name, repo, revision in loads:
    try:
        token = False if name == "stranger" else None
        policy = VLA0Policy.from_pretrained(repo, revision=revision, token=token)
        pre, post = make_pre_post_processors(policy.config, repo, pretrained_revision=revision)
        torch.save(post(policy.predict_action_chunk(pre(dict(batch)))), f"{sys.argv[3]}/{name}.pt")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory):
    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


def load(
    hub: LocalHub, home: Path, loads: list[tuple], env: dict, command: tuple[str, ...] = (), **more: str
):
    """Runs a command of the CLI and loads (name, repo id, revision); (what was printed, name → actions)."""
    home.mkdir(exist_ok=True)
    torch.save(observation(make_batch(rows=1)), home / "batch.pt")
    env = {**env, **hub.env(home / "hf"), **more}
    arguments = [json.dumps(loads), str(home / "batch.pt"), str(home), *command]
    printed = run_script(Path(sys.executable).name, "-c", LOAD, *arguments, env=env).stdout
    return printed, {path.stem: torch.load(path) for path in home.glob("*.pt") if path.stem != "batch"}


def chunk(folder: Path) -> torch.Tensor:
    policy = VLA0Policy.from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, str(folder))
    return post(policy.predict_action_chunk(pre(observation(make_batch(rows=1)))))


@pytest.mark.slow
def test_train_push_load(tiny_vlm, tiny_dataset, process_env, shared_hub, tmp_path):
    """lerobot-train pushes into a private repo; loading by id needs the token, then no network."""
    env = {**process_env, **shared_hub.env(tmp_path / "owner", HF_TOKEN=TOKEN)}
    log = run_script(
        "lerobot-train", "--policy.type=vla0", f"--policy.vlm={tiny_vlm}", "--policy.dtype=float32",
        "--policy.image_size=56", "--dataset.repo_id=local/tiny", f"--dataset.root={tiny_dataset}",
        "--batch_size=2", "--num_workers=0", "--log_freq=1", "--policy.device=cpu", "--steps=1",
        "--policy.push_to_hub=true", "--policy.repo_id=me/policy", "--policy.private=true",
        f"--output_dir={tmp_path}/run", env=env,
    ).stdout  # fmt: skip
    assert f"Model pushed to {shared_hub.url}/me/policy" in log
    files = shared_hub.files("me/policy")
    assert files.keys() >= CHECKPOINT
    card = files["README.md"].decode()
    assert 'Agent.from_pretrained("me/policy")' in card and str(tiny_vlm) not in card

    loads = [("stranger", "me/policy", None), ("main", "me/policy", None)]
    printed, found = load(shared_hub, tmp_path / "owner", loads, process_env, HF_TOKEN=TOKEN)
    expected = chunk(tmp_path / "run/checkpoints/last/pretrained_model")
    assert torch.equal(found.pop("main"), expected) and not found, printed
    assert "stranger: FileNotFoundError: 'me/policy' is neither a folder nor a Hub repo" in printed

    (tmp_path / "owner/main.pt").unlink()
    asked = len(shared_hub.requests)
    printed, found = load(shared_hub, tmp_path / "owner", loads[1:], process_env, HF_HUB_OFFLINE="1")
    assert torch.equal(found["main"], expected), printed
    assert len(shared_hub.requests) == asked


PUSH = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot_vla0.modeling_vla0 import VLA0Policy
root, vlm = sys.argv[1:]
HfApi().create_repo("me/vlm"); HfApi().upload_folder(repo_id="me/vlm", folder_path=vlm)
for name in ("one", "two", "adapter"):
    folder, peft = f"{root}/{name}", None
    policy = VLA0Policy.from_pretrained(f"{root}/one" if name == "adapter" else folder)
    policy.config.repo_id = "me/adapter" if name == "adapter" else "me/policy"
    if name == "adapter":
        policy.config.pretrained_path = "me/policy"
        policy.config.pretrained_revision = "v1"
        peft = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 4})
        import torch
        torch.manual_seed(0)
        [torch.nn.init.normal_(p, std=0.1) for n, p in peft.named_parameters() if "lora_" in n]
        torch.save(peft.state_dict(), f"{root}/adapter.pt")
    data = DatasetConfig("owner/data")
    pipeline = TrainPipelineConfig(dataset=data, policy=policy.config, output_dir=Path(root))
    policy.push_model_to_hub(pipeline, peft_model=peft)
    for processor in make_pre_post_processors(policy.config, f"{root}/one"):
        processor.push_to_hub(policy.config.repo_id)
    if name == "one":
        HfApi().create_tag("me/policy", tag="v1")
"""


@pytest.mark.slow
def test_revisions_an_adapter_and_import(tiny_vlm, process_env, shared_hub, tmp_path):
    """Two versions of a policy under one id, an adapter on the first of them, which has no vlm/ of its own,
    and a repo of the layout of ankgoyal/vla0-libero."""
    shared_hub.repos.pop("me/policy", None)
    config = make_config(tiny_vlm)
    for name, seed in (("one", 1), ("two", 2)):
        policy = VLA0Policy(config)
        randomise(policy, seed)
        policy.save_pretrained(tmp_path / name)
        stats = {"action": {"min": torch.full((7,), -float(seed)), "max": torch.full((7,), float(seed))}}
        for processor in make_vla0_pre_post_processors(config, stats):
            processor.save_pretrained(tmp_path / name)
    env = {**process_env, **shared_hub.env(tmp_path / "owner", HF_TOKEN=TOKEN)}
    run_script(Path(sys.executable).name, "-c", PUSH, str(tmp_path), str(tiny_vlm), env=env)
    names = shared_hub.files("me/adapter").keys()
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert not any(name.startswith("vlm/") for name in names)
    adapter = json.loads(shared_hub.files("me/adapter")["adapter_config.json"])
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/policy", "v1")

    sha = shared_hub.repos["me/policy"].branches["v1"]
    loads = [
        ("latest", "me/policy", None),
        ("tag", "me/policy", "v1"),
        ("sha", "me/policy", sha),
        ("none", "me/policy", "v3"),
        ("adapter", "me/adapter", None),
        ("nothing", "me/nothing", None),
    ]
    theirs = shared_hub.root / "them/vla0-libero"
    save_model(tiny_vlm, theirs / "model_last")
    write_config(theirs)
    write_stats(theirs, "dataset_stats.pkl")
    (theirs / "model_last.pth").write_bytes(b"large, and not needed")
    command = ("import", "--from=them/vla0-libero", f"--out={tmp_path}/imported")
    printed, found = load(shared_hub, tmp_path / "user", loads, process_env, command)
    main(["import", f"--from={theirs}", f"--out={tmp_path}/same"])
    imported, same = (tmp_path / name / "model.safetensors" for name in ("imported", "same"))
    assert imported.read_bytes() == same.read_bytes()
    assert not any("model_last.pth" in path for path in shared_hub.requests)
    assert "none: FileNotFoundError: 'me/policy' is neither" in printed
    assert "nothing: FileNotFoundError: 'me/nothing' is neither" in printed
    assert torch.equal(found["tag"], chunk(tmp_path / "one")) and torch.equal(found["sha"], found["tag"])
    assert not torch.equal(found["latest"], found["tag"]), printed
    peft = VLA0Policy.from_pretrained(tmp_path / "one").wrap_with_peft(
        peft_cli_overrides={"method_type": "LORA", "r": 4}
    )
    peft.load_state_dict(torch.load(tmp_path / "adapter.pt"))
    peft.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in (tmp_path / "one").glob("policy_*"):
        shutil.copy(file, tmp_path / "merged")
    assert torch.equal(found["adapter"], chunk(tmp_path / "merged")), printed
    assert not torch.equal(found["adapter"], found["tag"])


def test_push_of_an_adapter_on_a_local_base_warns(tiny_vlm, caplog):
    policy = VLA0Policy(make_config(tiny_vlm))
    policy.config.use_peft = True
    with caplog.at_level(logging.WARNING):
        card = policy.generate_model_card("owner/data", "vla0", None, None)  # LeRobot 0.6.2 passes no more
    assert card.data.datasets == "owner/data"
    assert f"adapter's base is the folder {tiny_vlm}: what was pushed loads on this" in caplog.text
