"""The model card, README.md of a checkpoint: written by every push, and by `lerobot-vla0 card`."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
from huggingface_hub import ModelCard, ModelCardData
from lerobot.configs import NormalizationMode, PreTrainedConfig, parser
from safetensors.torch import load_file

from ..configuration_vla0 import VLA0Config
from ..libero.report import read_episodes, table_row
from ..options import PolicyOptions

# (licence's id on the Hub, its name), as the models' own cards say.
LICENCES = {
    r"Qwen/Qwen2\.5-VL-3B-Instruct": ("qwen-research", "Qwen Research License"),
    r"Qwen/Qwen2\.5-VL-(7B|32B)-Instruct": ("apache-2.0", "Apache 2.0"),
    r"Qwen/Qwen2\.5-VL-72B-Instruct": ("qwen", "Qwen License"),
    r"Qwen/Qwen2-VL-(2B|7B)(-Instruct)?": ("apache-2.0", "Apache 2.0"),
}
NORMALISATION = {
    NormalizationMode.MIN_MAX: "minimum and maximum",
    NormalizationMode.QUANTILES: "quantiles 0.01 and 0.99",
    NormalizationMode.QUANTILE10: "quantiles 0.1 and 0.9",
}
BEGIN, END = "<!-- evaluation: written by lerobot-vla0 card -->", "<!-- end of evaluation -->"
TEMPLATE = """---
{metadata}
---

# {title}

[VLA-0](https://arxiv.org/abs/2510.13054): an unmodified vision-language model that looks at the cameras,
reads the instruction and writes the next {horizon} actions as {count} integers from 0 to {bins}. A policy for
[LeRobot](https://github.com/huggingface/lerobot), with its plugin `lerobot_policy_vla0`.

## Use it

```python
import lerobot_vla0  # pip install "lerobot_policy_vla0{extra}"
agent = lerobot_vla0.Agent.from_pretrained("{path}")
action = agent.act(observation, "{instruction}")  # ({dim},), in the robot's units
```

`observation` holds {cameras} as uint8 images (H, W, 3). With LeRobot's scripts:
`--policy.path={path}`.

## How it was made

| | |
|---|---|
{rows}

{evaluation}

## Licence

{licence}
"""


@dataclass(kw_only=True)
class CardConfig(PolicyOptions):
    """What the card is of: `--policy.path=` names a checkpoint folder. Of a README.md that is there, only the
    evaluation is changed."""

    # Results folder of `lerobot-vla0 eval`.
    results: Path | None = None
    # Where the README.md goes; None takes the checkpoint folder.
    out: Path | None = None

    def __post_init__(self) -> None:
        path = parser.get_path_arg("policy")
        if path and not Path(path).is_dir():
            raise ValueError(
                f"--policy.path={path!r} is no folder. Download the checkpoint first: hf download {path} "
                "--local-dir=<folder>"
            )
        super().__post_init__()


def write_card(config: CardConfig) -> Path:
    """Writes README.md, or renews the evaluation in the one that is there, and returns its path.

    Raises:
        ValueError: no policy, one of another type, or a results folder without a finished episode.
        FileNotFoundError: the results folder does not exist.
    """
    if config.policy is None:
        raise ValueError("the card of which checkpoint? --policy.path=<checkpoint folder>")
    if not isinstance(config.policy, VLA0Config):
        raise ValueError(f"{config.policy.pretrained_path} holds a {config.policy.type!r} policy, not vla0.")
    folder = Path(config.policy.pretrained_path)
    results = None if config.results is None else evaluation(config.results)
    file = Path(config.out or folder) / "README.md"
    if file.is_file():
        text = file.read_text()
        if results is not None:
            section = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
            text = section.sub(lambda _: results, text) if section.search(text) else f"{text}\n{results}\n"
    else:
        training = folder / "train_config.json"
        training = json.loads(training.read_text()) if training.is_file() else {}
        saved = PreTrainedConfig.from_pretrained(folder)  # its pretrained_path is what it was trained from
        text = str(make_card(saved, training, _saved_range(folder), results=results))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"Wrote {file}")
    return file


def make_card(
    config: VLA0Config,
    training: dict[str, Any],
    action_range: dict[str, Any] | None = None,
    *,
    dataset: dict[str, Any] | None = None,
    results: str | None = None,
) -> ModelCard:
    """
    Args:
        config: of the policy, as it is saved.
        training: what lerobot-train saves as train_config.json; {} if unknown.
        action_range: the statistics that actions are normalised by, name → D numbers.
        dataset: "episodes" and "frames" of the data set.
        results: the section that `evaluation` returns.
    """
    data = training.get("dataset") or {}
    # A resumed run's own checkpoint is no base.
    base = config.pretrained_path if _is_repo(config.pretrained_path) else config.vlm
    licence, licence_name = _licence(config.vlm)
    settings: dict[str, Any] = {"license": config.license or licence}
    if settings["license"] in ("qwen-research", "qwen"):  # not among the Hub's own ids
        settings |= {
            "license_name": settings["license"],
            "license_link": _link(config.vlm) + "/blob/main/LICENSE",
        }
        settings["license"] = "other"
    if _is_repo(base):
        settings["base_model"] = str(base)
        settings["base_model_relation"] = "adapter" if config.use_peft else "finetune"
    metadata = ModelCardData(
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=sorted({*(config.tags or []), "robotics", "lerobot", "vla0", "vision-language-action"}),
        datasets=data["repo_id"] if _is_repo(data.get("repo_id")) else None,
        **settings,
    )
    text = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=(config.repo_id or "VLA-0 policy").rpartition("/")[2],
        horizon=config.chunk_size,
        count=config.chunk_size * config.action_feature.shape[0],
        bins=config.num_bins,
        extra="[peft]" if config.use_peft else "",
        path=config.repo_id or "<this folder>",
        instruction="pick up the milk and place it in the basket",
        dim=config.action_feature.shape[0],
        cameras=", ".join(f"`{key}`" for key in config.camera_keys)
        + (" and the robot's state" * config.use_state),
        rows="\n".join(
            f"| {name} | {value} |" for name, value in _rows(config, training, action_range, dataset)
        ),
        evaluation=results
        or f"{BEGIN}\n## Evaluation\n\nNone yet. `lerobot-vla0 eval` measures, `lerobot-vla0 card` enters it "
        f"here.\n{END}",
        licence=f"The base model {_shown(config.vlm)} is under "
        + (
            f"the {licence_name}, which binds what is trained from it."
            if licence
            else "the licence that it names."
        )
        + (f" These weights: {config.license}." if config.license else ""),
    )
    return ModelCard(text)


def _rows(
    config: VLA0Config,
    training: dict[str, Any],
    action_range: dict[str, Any] | None,
    dataset: dict[str, Any] | None,
) -> list[tuple[str, str]]:
    """The table of how it was made: (name, value)."""
    rows = [("base model", _shown(config.vlm))]
    if _is_repo(config.pretrained_path):
        rows.append(("trained on from", _shown(config.pretrained_path)))
    if (data := training.get("dataset") or {}).get("repo_id"):
        size = f", {dataset['episodes']} episodes, {dataset['frames']:,} frames" if dataset else ""
        rows.append(("data set", _shown(data["repo_id"]) + size))
    if training.get("steps"):
        optimiser = training.get("optimizer") or {}
        steps = f"{training['steps']:,} steps, batch {training.get('batch_size')} per process"
        rate = f"{optimiser.get('type', 'adamw')}, learning rate {optimiser.get('lr', config.optimizer_lr):g}"
        rows.append(("training", f"{steps}, {rate}, {config.dtype}, seed {training.get('seed')}"))
    if config.use_peft and (peft := training.get("peft")):
        rows.append(("adapter", f"{peft['method_type']}, rank {peft['r']}"))
    layout = "side by side in one picture" if config.tile_images else "one picture each"
    crop = f"crop {config.crop_ratio:g} (random in training), {config.image_size}×{config.image_size} pixels"
    masked = f"up to {config.action_mask_prob:g} of the characters"
    of = "each instruction's actions" if config.action_norm == "task" else "the data set's actions"
    rows += [
        ("pictures", f"{', '.join(config.camera_keys)}: {crop}, {layout}; colour jitter {config.jitter}"),
        ("masked action augmentation", f"{masked}; {config.action_mask_skip_prob:g} of the examples without"),
        (
            "action normalisation",
            f"{NORMALISATION[config.normalization_mapping['ACTION']]} of {of} → 0..{config.num_bins}",
        ),
    ]
    for name, values in (action_range or {}).items():
        rows.append((f"action {name}", str([round(float(value), 4) for value in values])))
    return rows


def evaluation(folder: Path) -> str:
    """The card's section from a results folder of `lerobot-vla0 eval`: success by suite, with intervals.

    Raises:
        FileNotFoundError: no such results.
        ValueError: no finished episode.
    """
    settings = Path(folder) / "settings.json"
    if not settings.is_file():
        raise FileNotFoundError(f"results={str(folder)!r} is no results folder of `lerobot-vla0 eval`.")
    settings, episodes = json.loads(settings.read_text()), read_episodes(folder)
    if not episodes:
        raise ValueError(f"results={str(folder)!r} holds no finished episode.")
    suites: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for episode in episodes.values():
        suites[episode["suite"]].append(episode)
    lines = [BEGIN, "## Evaluation", ""]
    if settings["stand_in_assets"]:
        lines += ["**Measured on stand-in assets: these are not LIBERO scores.**", ""]
    lines += [
        "| suite | tasks | success | 95 % interval | mean steps of successes |",
        "|---|---|---|---|---|",
    ]
    lines += [
        table_row(s, str(len({e["task_id"] for e in rows})), rows) for s, rows in sorted(suites.items())
    ]
    if len(suites) > 1:
        lines.append(table_row("**all**", "", list(episodes.values())))
    policy = settings["policy"]
    lines += [
        "",
        f"`lerobot-vla0 eval`: {settings['episodes']} episodes per task from LIBERO's stored initial states "
        f"{settings['first_init_state']} and on, {settings['image_size']}×{settings['image_size']} pixels, "
        f"n_action_steps={policy['n_action_steps']}, ensemble_size={policy['ensemble_size']}, assets "
        f"{', '.join(sorted(set(settings['assets'])))}.",
    ]
    if len(episodes) < settings["episodes_in_all"]:
        lines += ["", f"Unfinished: {len(episodes)} of {settings['episodes_in_all']} episodes."]
    return "\n".join([*lines, END])


def training_of(pipeline: Any) -> dict[str, Any]:
    """What lerobot-train saves as train_config.json; {} of None."""
    return {} if pipeline is None else draccus.encode(pipeline)


def _saved_range(folder: Path) -> dict[str, Any]:
    """The action's statistics in a checkpoint's postprocessor."""
    state: dict[str, Any] = {}
    for file in folder.glob("policy_postprocessor_*.safetensors"):
        state |= load_file(file)
    names = ("min", "max", "q01", "q99", "q10", "q90")
    return {name: state[f"action.{name}"].tolist() for name in names if f"action.{name}" in state}


def _licence(vlm: str) -> tuple[str | None, str]:
    return next((found for pattern, found in LICENCES.items() if re.fullmatch(pattern, str(vlm))), (None, ""))


def _is_repo(name: Any) -> bool:
    """Whether it can be a Hub repo: owner/name, no folder here, and no recording ("local/...")."""
    name = str(name)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("local/")
    return bool(named) and not Path(name).exists()


def _link(name: Any) -> str:
    return f"https://huggingface.co/{name}"


def _shown(name: Any) -> str:
    """A link; of a folder only its name, because paths are nobody else's business."""
    return f"[{name}]({_link(name)})" if _is_repo(name) else f"`{Path(str(name)).name}` (not on the Hub)"
