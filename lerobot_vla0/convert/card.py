"""The model card, README.md of a checkpoint: LeRobot's, with what LeRobot cannot know of this policy. Every
push writes it, and so does `lerobot-vla0 card`."""

import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import draccus
import lerobot
from huggingface_hub import ModelCard, ModelCardData
from lerobot.configs import NormalizationMode, PreTrainedConfig, parser
from lerobot.utils.constants import ACTION
from safetensors.torch import load_file

from ..checkpoint import ADAPTER_CONFIG, readable
from ..configuration_vla0 import VLA0Config
from ..files import check_place, new_file, read_json, reading
from ..libero.report import read_episodes, table_row
from ..options import PolicyOptions
from ..task_stats import STATISTICS

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
NO_EVALUATION = f"""\
{BEGIN}
## Evaluation

None yet. `lerobot-vla0 eval` measures, `lerobot-vla0 card` enters it here.
{END}"""
# Our parts of the card, in Jinja as LeRobot's template. ABOUT comes before its section "Model Details"; MADE
# takes the place of its section "Evaluation", which is empty.
ABOUT = """\
[VLA-0](https://arxiv.org/abs/2510.13054): an unmodified vision-language model that looks at the cameras,
reads the instruction and writes the next {{ config.chunk_size }} actions \
as {{ config.chunk_size * dim }} integers from 0 to {{ config.num_bins }}. A policy for LeRobot,
with its plugin `lerobot_policy_vla0`:

```python
import lerobot_vla0  # pip install "lerobot_policy_vla0{{ '[peft]' if config.use_peft }}"
agent = lerobot_vla0.Agent.from_pretrained("{{ path }}")
action = agent.act(observation, "pick up the milk and place it in the basket")  # ({{ dim }},)
```

`observation` holds `{{ config.camera_keys | join("`, `") }}` as uint8 images (H, W, 3)\
{{ " and the robot's state" if config.needs_state }}; `action` is in the robot's units.
With LeRobot's scripts: `--policy.path={{ path }}`.

"""
MADE = """\
## How it was made

| | |
|---|---|
| base model | {{ vlm }}, trained in {{ config.dtype }} |
{% if imported %}| imported from | {{ imported }} |
{% endif %}{% if trained_from %}| trained on from | {{ trained_from }} |
{% endif %}{% if data_set %}| data set | {{ data_set }} |
{% endif %}{% if peft %}| adapter | {{ peft.method_type }}, rank {{ peft.r }} |
{% endif %}| pictures | {{ config.camera_keys | join(", ") }}: \
crop {{ config.crop_ratio }} (random in training), \
{{ config.image_fit }} to {{ config.image_size }}×{{ config.image_size }} pixels, \
{{ "side by side in one picture" if config.tile_images else "one picture each" }}; colour jitter \
{{ config.jitter }}{{ "; camera_regions %s" % config.camera_regions if config.camera_regions }}\
{{ "; %d may be missing, and is black then" % config.empty_cameras if config.empty_cameras }} |
| prompt | {{ 'with' if config.add_vision_id else 'without' }} "Picture 1: " before the picture \
(`add_vision_id={{ config.add_vision_id | lower }}`) |
| masked action augmentation | up to {{ config.action_mask_prob }} of the characters; \
{{ config.action_mask_skip_prob }} of the examples without |
| action normalisation | {{ normalisation }} of \
{{ "each instruction's" if config.action_norm == "task" else "the data set's" }} \
{{ "relative actions (minus the state that is seen)" if config.use_relative_actions else "actions" }} \
→ 0..{{ config.num_bins }} |
{% if config.use_relative_actions %}| not relative | {{ absolute | join(", ") or "none" }} |
{% endif %}{% for name, values in action_range.items() %}| action {{ name }} | {{ values }} |
{% endfor %}
{{ evaluation }}
"""


@dataclass(kw_only=True)
class CardConfig(PolicyOptions):
    """`--policy.path=` names the checkpoint folder. Of a README.md in it only the evaluation is changed."""

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
    """Writes README.md and returns its path. In a README.md that exists, the evaluation section is replaced,
    or appended if there is none.

    Raises:
        ValueError: no policy, one of another type, or a results folder without a finished episode.
        FileNotFoundError: the results folder does not exist.
    """
    folder = Path(config.require_policy("the card of which checkpoint?").pretrained_path)
    results = None if config.results is None else evaluation(config.results)
    file = check_place(Path(config.out or folder) / "README.md", "file")
    if file.is_file():
        with reading(file):
            text = file.read_text(encoding="utf-8")
        if results is not None:
            section = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
            text = section.sub(lambda _: results, text) if section.search(text) else f"{text}\n{results}\n"
    else:
        training_file = folder / "train_config.json"
        training = read_json(training_file) if training_file.is_file() else {}
        for name in ("dataset", "optimizer", "peft"):
            if not isinstance(training.get(name), dict | None):
                raise ValueError(f"{training_file} is damaged: {name} is {training[name]!r}, no object.")
        # Read again, because `pretrained_path` of config.policy is the checkpoint itself, not its base.
        saved = PreTrainedConfig.from_pretrained(folder)
        text = str(make_card(saved, training, _saved_range(folder), results=results))
    with new_file(file) as draft:
        draft.write_text(text, encoding="utf-8")
    print(f"Wrote {file}")
    return file


def push_card(config: VLA0Config, repo_id: str, pipeline: Any, dataset_meta: Any) -> ModelCard:
    """The card of a push. Warns if an adapter's base is a folder of this machine.

    Args:
        config: of the policy.
        repo_id: of the data set.
        pipeline: lerobot-train's TrainPipelineConfig, or None.
        dataset_meta: LeRobotDatasetMetadata of the data set, or None.
    """
    base = str(config.pretrained_path or config.vlm)
    if config.use_peft and Path(base).is_dir():
        logging.warning(
            f"the adapter's base is the folder {base}: what was pushed loads on this machine only. Push the "
            f"base, too, and name it as base_model_name_or_path in {ADAPTER_CONFIG}, or push what "
            "`lerobot-vla0 merge` writes."
        )
    training = {"dataset": {"repo_id": repo_id}} if pipeline is None else draccus.encode(pipeline)
    names = STATISTICS[config.normalization_mapping["ACTION"]] if dataset_meta is not None else ()
    action_range = {name: dataset_meta.stats[ACTION][name] for name in names}
    return make_card(config, training, action_range, dataset_meta=dataset_meta)


def make_card(
    config: VLA0Config,
    training: dict[str, Any],
    action_range: dict[str, Any],
    *,
    dataset_meta: Any = None,
    results: str | None = None,
    imported: str | None = None,
) -> ModelCard:
    """LeRobot's template with our parts. LeRobot's own function takes objects that a checkpoint folder does
    not hold, and asks the Hub to check the card.

    Args:
        config: of the policy, as it is saved.
        training: what lerobot-train saves as train_config.json; {} if unknown.
        action_range: the statistics that actions are normalised by, name → D numbers.
        dataset_meta: LeRobotDatasetMetadata of what was trained on; None if unknown.
        results: the section that `evaluation` returns.
        imported: where the checkpoint comes from, if it was made by other code.
    """
    data_set = (training.get("dataset") or {}).get("repo_id")
    found = (names for pattern, names in LICENCES.items() if re.fullmatch(pattern, str(config.vlm)))
    licence, name = next(found, (None, ""))
    terms = f"the {name}, which binds what is trained from it" if licence else "the licence that it names"
    excluded = [name.lower() for name in config.relative_exclude_joints if name]
    context = {
        "model_name": config.type,
        "license": f"The base model {_shown(config.vlm)} is under {terms}."
        + (f" These weights: {config.license}." if config.license else ""),
        "base_model": None,  # the template recommends it as --policy.path, but a VLM is no policy
        "policy_repo_id": config.repo_id,
        "cameras": [key.rpartition(".")[2] for key in config.camera_keys],
        "input_features": config.input_features,
        "output_features": config.output_features,
    }
    if training.get("steps"):
        optimizer = training.get("optimizer") or {}
        context["training"] = training | {
            "optimizer": optimizer.get("type"),
            "lr": optimizer.get("lr"),
            "lerobot_version": lerobot.__version__,
        }
    if dataset_meta is not None:
        context["robot_type"] = dataset_meta.robot_type
        context["dataset"] = {
            "repo_id": data_set,
            "episodes": dataset_meta.total_episodes,
            "frames": dataset_meta.total_frames,
            "fps": dataset_meta.fps,
            "tasks": list(dataset_meta.tasks.index),
        }
    template = files("lerobot.templates") / "lerobot_modelcard_template.md"
    top, heading, rest = template.read_text(encoding="utf-8").partition("## Model Details\n")
    details, _, rest = rest.partition("## Evaluation\n")
    _, line, citation = rest.partition("\n---\n")
    return ModelCard.from_template(
        _metadata(config, licence, data_set),
        template_str=top + ABOUT + heading + details + MADE + line + citation,
        **context,
        config=config,
        dim=config.action_feature.shape[0],
        path=config.repo_id or "<this folder>",
        vlm=_shown(config.vlm),
        imported=imported,
        trained_from=_shown(config.pretrained_path) if _is_repo(config.pretrained_path) else None,
        data_set=_shown(data_set, "datasets/") if data_set and dataset_meta is None else None,
        peft=training.get("peft") if config.use_peft else None,
        absolute=[n for n in config.action_feature_names or () if any(x in n.lower() for x in excluded)],
        normalisation=NORMALISATION[config.normalization_mapping["ACTION"]],
        action_range={key: [round(float(v), 4) for v in values] for key, values in action_range.items()},
        evaluation=results or NO_EVALUATION,
    )


def _metadata(config: VLA0Config, licence: str | None, data_set: str | None) -> ModelCardData:
    """The card's YAML header, by which the Hub finds and links repos."""
    settings: dict[str, Any] = {"license": config.license or licence}
    if settings["license"] in ("qwen-research", "qwen"):  # not among the Hub's own ids
        settings = {
            "license": "other",
            "license_name": settings["license"],
            "license_link": f"https://huggingface.co/{config.vlm}/blob/main/LICENSE",
        }
    # After a resumed run, pretrained_path is the run's own checkpoint folder.
    base = config.pretrained_path if _is_repo(config.pretrained_path) else config.vlm
    if _is_repo(base):
        settings["base_model"] = str(base)
        settings["base_model_relation"] = "adapter" if config.use_peft else "finetune"
    return ModelCardData(
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=sorted({*(config.tags or []), "robotics", "lerobot", "vla0", "vision-language-action"}),
        datasets=data_set if _is_repo(data_set) else None,
        **settings,
    )


def evaluation(folder: Path) -> str:
    """The card's section "Evaluation" from a results folder of `lerobot-vla0 eval`: success rates by suite,
    with 95 % intervals.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: no finished episode.
    """
    settings = Path(folder) / "settings.json"
    if not settings.is_file():
        raise FileNotFoundError(f"results={str(folder)!r} is no results folder of `lerobot-vla0 eval`.")
    with reading(folder):
        return _evaluation(read_json(settings), list(read_episodes(folder).values()), folder)


def _evaluation(settings: dict[str, Any], episodes: list[dict[str, Any]], folder: Path) -> str:
    if not episodes:
        raise ValueError(f"results={str(folder)!r} holds no finished episode.")
    suites: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for episode in episodes:
        suites[episode["suite"]].append(episode)
    lines = [BEGIN, "## Evaluation", ""]
    if settings["stand_in_assets"]:
        lines += ["**Measured on stand-in assets: these are not LIBERO scores.**", ""]
    lines += ["| suite | tasks | success | 95 % interval | mean steps of successes |", "|---" * 5 + "|"]
    for suite, rows in sorted(suites.items()):
        lines.append(table_row(suite, str(len({e["task_id"] for e in rows})), rows))
    if len(suites) > 1:
        lines.append(table_row("**all**", "", episodes))
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


def _saved_range(folder: Path) -> dict[str, Any]:
    """The action's statistics in a checkpoint's postprocessor."""
    state: dict[str, Any] = {}
    for file in folder.glob("policy_postprocessor_*.safetensors"):
        with readable(file):
            state |= load_file(file)
    names = ("min", "max", "q01", "q99", "q10", "q90")
    return {name: state[f"action.{name}"].tolist() for name in names if f"action.{name}" in state}


def _is_repo(name: Any) -> bool:
    """Whether a name can be a Hub repo: owner/name, no folder on this machine, and not "local/...", which
    `lerobot-vla0 record` names its data sets."""
    name = str(name)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("local/")
    return bool(named) and not Path(name).exists()


def _shown(name: Any, kind: str = "") -> str:
    """A link to the Hub, or the name of a folder: its path says where a user keeps files. `kind` is
    "datasets/" for a data set."""
    if _is_repo(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{Path(str(name)).name}` (not on the Hub)"
