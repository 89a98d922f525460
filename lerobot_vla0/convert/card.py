"""The model card, README.md of a checkpoint. Every push writes it, and so does `lerobot-vla0 card`."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
from huggingface_hub import ModelCard, ModelCardData
from lerobot.configs import PreTrainedConfig

from ..checkpoint import ADAPTER_CONFIG
from ..cli import PolicyOptions
from ..configuration_vla0 import VLA0Config
from ..files import read_json
from ..libero.report import read_episodes, table_row

# Licences of base models, as their own cards say.
LICENCES = {"Qwen/Qwen2.5-VL-3B-Instruct": "qwen-research", "Qwen/Qwen2.5-VL-7B-Instruct": "apache-2.0"}
BEGIN, END = "<!-- evaluation: written by lerobot-vla0 card -->", "<!-- end of evaluation -->"
TEMPLATE = Path(__file__).with_name("card_template.md")
# Fields of the config that say how it was made.
FIELDS = (
    "dtype", "crop_ratio", "image_fit", "image_size", "tile_images", "empty_cameras", "jitter",
    "add_vision_id", "action_mask_prob", "action_norm", "use_relative_actions",
)  # fmt: skip


@dataclass(kw_only=True)
class CardConfig(PolicyOptions):
    """`--policy.path=` names the checkpoint folder. Of a README.md in it only the evaluation is changed."""

    # Results folder of `lerobot-vla0 eval`.
    results: Path | None = None
    # Folder of the README.md; None takes the checkpoint's.
    out: Path | None = None


def write_card(config: CardConfig) -> Path:
    """Writes README.md and returns its path.

    Raises:
        ValueError: no checkpoint was named, or the results have no finished episode.
    """
    folder = Path(config.require_policy("the card of which checkpoint?").pretrained_path)
    file, training = (config.out or folder) / "README.md", folder / "train_config.json"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        # Read again: `pretrained_path` of config.policy is the checkpoint itself, not its base.
        saved = PreTrainedConfig.from_pretrained(folder)
        text = str(make_card(saved, read_json(training) if training.is_file() else {}))
    if config.results is not None:
        section = evaluation(config.results)
        text, count = re.subn(f"{BEGIN}.*?{END}", lambda _: section, text, flags=re.DOTALL)
        text += "" if count else f"\n{section}\n"
    file.write_text(text, encoding="utf-8")
    print(f"Wrote {file}")
    return file


def push_card(config: VLA0Config, dataset_repo_id: str, cfg: Any, dataset_meta: Any) -> ModelCard:
    """The card of a push. LeRobot's `cfg` (TrainPipelineConfig) and `dataset_meta` may be None."""
    base = str(config.pretrained_path or config.vlm)
    if config.use_peft and Path(base).is_dir():
        logging.warning(
            f"the adapter's base is the folder {base}: what was pushed loads on this machine only. Push the "
            f"base, too, and name it in {ADAPTER_CONFIG}, or push what `lerobot-vla0 merge` writes."
        )
    training = {"dataset": {"repo_id": dataset_repo_id}} if cfg is None else draccus.encode(cfg)
    return make_card(config, training, meta=dataset_meta)


def make_card(config: VLA0Config, training: dict[str, Any], meta: Any = None, origin: str = "") -> ModelCard:
    """The template, filled from a policy's config, the content of train_config.json ({} if unknown), the data
    set's LeRobotDatasetMetadata, if it is at hand, and the origin of an imported checkpoint."""
    data_set, licence = (training.get("dataset") or {}).get("repo_id"), LICENCES.get(config.vlm)
    # After a resumed run, pretrained_path is the run's own checkpoint folder.
    base = str(config.pretrained_path if _is_repo(config.pretrained_path) else config.vlm)
    data = ModelCardData(
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=sorted({*(config.tags or []), "robotics", "lerobot", "vla0", "vision-language-action"}),
        datasets=data_set if _is_repo(data_set) else None,
        license=config.license or licence,
    )
    if data.license == "qwen-research":  # not among the Hub's ids
        link = f"https://huggingface.co/{config.vlm}/blob/main/LICENSE"
        data.license, data.license_name, data.license_link = "other", licence, link
    if _is_repo(base):
        data.base_model, data["base_model_relation"] = base, "adapter" if config.use_peft else "finetune"
    values = {"config": config, "fields": FIELDS, "dim": config.action_feature.shape[0], "licence": licence}
    values |= {"base": _link(base), "data_set": data_set and _link(data_set, "datasets/"), "origin": origin}
    return ModelCard.from_template(data, TEMPLATE, training=training, meta=meta, **values)


def evaluation(folder: Path) -> str:
    """The card's evaluation from a results folder: success by suite, with 95 % intervals."""
    settings, episodes = read_json(folder / "settings.json"), list(read_episodes(folder).values())
    if not episodes:
        raise ValueError(f"results={str(folder)!r} holds no finished episode.")
    lines = ["| suite | tasks | success | 95 % interval | mean steps of successes |", "|---" * 5 + "|"]
    for suite in sorted({episode["suite"] for episode in episodes}):
        rows = [episode for episode in episodes if episode["suite"] == suite]
        lines.append(table_row(suite, str(len({row["task_id"] for row in rows})), rows))
    policy = settings["policy"]
    stand_in = " **Stand-in assets: these are not LIBERO scores.**" if settings["stand_in_assets"] else ""
    lines.append(
        f"\n`lerobot-vla0 eval`, {len(episodes)} of {settings['episodes_in_all']} episodes, n_action_steps="
        f"{policy['n_action_steps']}, ensemble_size={policy['ensemble_size']}.{stand_in}"
    )
    return "\n".join([BEGIN, "## Evaluation", "", *lines, END])


def _is_repo(name: Any) -> bool:
    """Whether a name can be one of the Hub: owner/name, no folder here, and not local/..."""
    return bool(re.fullmatch(r"(?!local/)[\w.-]+/[\w.-]+", str(name))) and not Path(str(name)).exists()


def _link(name: str, kind: str = "") -> str:
    """A link to the Hub, or the name of a folder without its path."""
    return f"[{name}](https://huggingface.co/{kind}{name})" if _is_repo(name) else f"`{Path(name).name}`"
