"""Options of `lerobot-vla0 sft`: TRL's flat ones, and LeRobot's in sections, from a YAML file and the command
line.

    --learning_rate 1e-5 --max_steps 1000       TRL's SFTConfig, and the few of `SFTOptions`
    --policy.image_size=224 --dataset.root=...  LeRobot's, as for lerobot-train
    --eval.episodes=10                          of `lerobot-vla0 eval`, for --eval_after_train

In the YAML file, `policy:`, `dataset:` and `eval:` are mappings and everything else stands at the top. The
command line overrides the file, the file overrides the defaults.
"""

import dataclasses
import difflib
import json
import os
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from transformers.utils import is_torch_bf16_gpu_available

from ..configuration_vla0 import VLA0Config
from ..libero.evaluate import EvalConfig
from ..options import parse_options

if TYPE_CHECKING:
    from trl import SFTConfig, TrlParser

PROG = "lerobot-vla0 sft"
SECTIONS = {"policy": VLA0Config, "dataset": DatasetConfig, "eval": EvalConfig}

# Fields that are decided elsewhere, and where.
REFUSED = {
    "policy": {
        "device": "use --use_cpu",
        "gradient_checkpointing": "use --gradient_checkpointing",
        "optimizer_lr": "use --learning_rate",
        "optimizer_betas": "use --adam_beta1 and --adam_beta2",
        "optimizer_eps": "use --adam_epsilon",
        "optimizer_weight_decay": "use --weight_decay",
        "optimizer_grad_clip_norm": "use --max_grad_norm",
        "scheduler_warmup_steps": "use --warmup_steps",
        "push_to_hub": "use --push_to_hub",
        "repo_id": "use --hub_model_id",
        "private": "use --hub_private_repo",
        "use_peft": "use --use_lora",
        "pretrained_path": "use --policy.path",
    },
    "dataset": {"eval_split": "lerobot-train evaluates on held-out episodes"},
    "eval": {"policy": "the final checkpoint is evaluated", "out": "results go to <output_dir>/eval"},
}
# Options of SFTConfig that prepare text data, load models or write repos in ways that do not apply here.
WITHOUT_EFFECT = (
    *(
        "dataset_text_field",
        "dataset_kwargs",
        "dataset_num_proc",
        "max_length",
        "truncation_mode",
        "eos_token",
    ),
    *(
        "packing",
        "packing_strategy",
        "eval_packing",
        "padding_free",
        "shuffle_dataset",
        "remove_unused_columns",
    ),
    *("completion_only_loss", "assistant_only_loss", "model_init_kwargs", "chat_template_path"),
    *("hub_strategy", "hub_token", "hub_always_push", "load_best_model_at_end"),
)


@dataclasses.dataclass
class SFTOptions:
    """What neither TRL nor LeRobot has."""

    train_suite: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Train on the episodes of this LIBERO suite only, told by their tasks: libero_spatial, "
            "libero_object, libero_goal, libero_10, libero_90, or several separated by commas."
        },
    )
    max_episodes: int | None = dataclasses.field(
        default=None, metadata={"help": "Train on the first N episodes (of those that are left)."}
    )
    use_lora: bool = dataclasses.field(
        default=False, metadata={"help": "Train LoRA adapters and leave the model as it is (needs peft)."}
    )
    # Defaults of TRL's ModelConfig.
    lora_r: int = dataclasses.field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = dataclasses.field(default=32, metadata={"help": "Adapters are scaled by alpha / r."})
    lora_dropout: float = dataclasses.field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Ends of the names of the modules to adapt; default: the policy's own choice."},
    )
    eval_after_train: bool = dataclasses.field(
        default=False,
        metadata={"help": "Evaluate the final checkpoint on LIBERO; success rates go to report_to."},
    )


@dataclasses.dataclass
class Arguments:
    """Everything that was asked for. `evaluation` holds options of `lerobot-vla0 eval`."""

    options: SFTOptions
    training: "SFTConfig"
    policy: VLA0Config
    dataset: DatasetConfig
    evaluation: list[str]


def parse(argv: list[str]) -> Arguments:
    """Options of the command line and of the YAML file that `--config` names.

    Raises:
        ImportError: trl is not installed.
        FileNotFoundError: the YAML file is not there.
        ValueError: an option that does not exist (names the nearest), one without effect, or a bad value.
    """
    try:
        from trl import SFTConfig, TrlParser
    except ImportError as error:
        raise ImportError("TRL is not installed: pip install 'lerobot_policy_vla0[sft]'") from error
    # argparse's own usage would be pages long.
    parser = TrlParser(
        [SFTOptions, SFTConfig],
        prog=PROG,
        usage=f"{PROG} [--config FILE.yaml] [--option value ...]   (--help lists the options)",
        allow_abbrev=False,
    )
    parser.set_defaults(**_defaults())
    if {"-h", "--help"} & set(argv):
        _print_help(TrlParser, SFTConfig)
        sys.exit(0)
    file, flat, sections = _split(argv)
    known = [field.name for cls in (SFTOptions, SFTConfig) for field in dataclasses.fields(cls)]
    at_top, in_sections = _read(file) if file else ({}, {})
    for name in at_top:
        _check_known(name, [*known, *SECTIONS, "env"], f"in {file}")
    sections = {name: in_sections.get(name, {}) | sections[name] for name in SECTIONS}
    os.environ.update({key: str(value) for key, value in at_top.pop("env", {}).items()})  # as TrlParser does
    parser.set_defaults_with_config(**at_top)
    probe, rest = parser.parse_known_args(flat)
    for token in rest:
        if not token.startswith("--"):
            raise ValueError(f"{token!r} is no option: write --option value.")
        _check_known(token[2:].partition("=")[0], [*known, *(f"{name}." for name in SECTIONS)], "")
    given = {*at_top, *(t[2:].partition("=")[0].replace("-", "_") for t in flat if t.startswith("--"))}
    useless = sorted(given.intersection(WITHOUT_EFFECT))
    if useless:
        raise ValueError(f"{useless[0]} has no effect here: examples are made by the policy. Leave it out.")

    bf16 = is_torch_bf16_gpu_available() and not probe.use_cpu and not probe.fp16
    policy = _policy(sections["policy"], "bfloat16" if bf16 else "float32")
    if "bf16" not in given:
        parser.set_defaults(bf16=bf16 and policy.dtype == "bfloat16")
    options, training = parser.parse_args_into_dataclasses(flat, look_for_args_file=False)
    if training.push_to_hub and not training.hub_model_id:
        raise ValueError("push_to_hub needs a repo to push to: --hub_model_id=<you>/<name>.")
    _copy_to_policy(training, policy)
    return Arguments(
        options, training, policy, _dataset(sections["dataset"]), _evaluation(sections["eval"], options)
    )


def _defaults() -> dict[str, Any]:
    """Where TRL's defaults are not the published recipe, or would write large checkpoints too often."""
    return {
        "output_dir": "outputs/sft",
        "learning_rate": VLA0Config.optimizer_lr,
        "adam_beta1": VLA0Config.optimizer_betas[0],
        "adam_beta2": VLA0Config.optimizer_betas[1],
        "adam_epsilon": VLA0Config.optimizer_eps,
        "weight_decay": VLA0Config.optimizer_weight_decay,
        "max_grad_norm": VLA0Config.optimizer_grad_clip_norm,
        "lr_scheduler_type": "constant_with_warmup",  # plain constant without --warmup_steps
        "save_steps": 5000,
        "dataloader_num_workers": 4,
        # Reentrant checkpointing loses the gradients of adapters on a frozen model.
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        # The data set is a list of indices; the trainer makes the examples.
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
    }


def _split(argv: list[str]) -> tuple[Path | None, list[str], dict[str, dict[str, str]]]:
    """(YAML file, flat options, {section: {field: value}}) of a command line."""
    file, flat, sections = None, [], {name: {} for name in SECTIONS}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        section, is_nested, field = name.removeprefix("--").partition(".")
        if name != "--config" and not (is_nested and section in SECTIONS):
            flat.append(token)
            continue
        if not has_value:
            if not tokens or tokens[0].startswith("--"):
                raise ValueError(f"{name} has no value.")
            value = tokens.pop(0)
        if name == "--config":
            file = Path(value)
        else:
            sections[section][field] = value
    for name, fields in sections.items():
        _check_section(name, fields, "")
    return file, flat, sections


def _read(file: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """(flat options, {section: {field: value as on the command line}}) of a YAML file."""
    if not file.is_file():
        raise FileNotFoundError(f"config={str(file)!r}: there is no such file.")
    content = yaml.safe_load(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold `option: value` lines.")
    sections = {}
    for name in SECTIONS:
        fields = content.pop(name, None) or {}
        if not isinstance(fields, dict):
            raise ValueError(f"{file}: {name} must be a mapping, got {fields!r}.")
        _check_section(name, fields, f"in {file}")
        sections[name] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
    return content, sections


def _check_section(section: str, fields: Iterable[str], where: str) -> None:
    for field in fields:
        name = field.partition(".")[0]
        if name in REFUSED[section]:
            raise ValueError(f"{section}.{name} has no effect here: {REFUSED[section][name]}.")
        _check_known(f"{section}.{name}", [f"{section}.{name}" for name in _fields(section)], where)


def _fields(section: str) -> list[str]:
    names = [field.name for field in dataclasses.fields(SECTIONS[section])]
    return ["type", "path", *names] if section == "policy" else names


def _check_known(name: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if name.replace("-", "_") in known:
        return
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    raise ValueError(
        f"unknown option {name!r}{where and ' ' + where}. The nearest is {nearest[0]!r}; --help lists all."
    )


def _arguments(fields: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def _policy(fields: dict[str, str], dtype: str) -> VLA0Config:
    kind, path = fields.pop("type", "vla0"), fields.pop("path", None)
    if kind != "vla0":
        raise ValueError(
            f"policy.type={kind!r}: this trains vla0 only. lerobot-train trains LeRobot's others."
        )
    if path is None:
        config = parse_options(VLA0Config, PROG, _arguments({"dtype": dtype} | fields))
    else:
        config = PreTrainedConfig.from_pretrained(path, cli_overrides=_arguments(fields))
        if not isinstance(config, VLA0Config):
            raise ValueError(f"policy.path={path!r} is a {config.type!r} policy, not vla0.")
        config.pretrained_path = Path(path)
    return config


def _copy_to_policy(training: "SFTConfig", config: VLA0Config) -> None:
    """The checkpoint's config says how it was trained."""
    config.device = training.device.type
    config.gradient_checkpointing = training.gradient_checkpointing
    config.optimizer_lr, config.optimizer_eps = training.learning_rate, training.adam_epsilon
    config.optimizer_betas = (training.adam_beta1, training.adam_beta2)
    config.optimizer_weight_decay = training.weight_decay
    config.optimizer_grad_clip_norm = training.max_grad_norm
    config.push_to_hub, config.repo_id = training.push_to_hub, training.hub_model_id
    config.private = training.hub_private_repo
    training.push_to_hub = False  # LeRobot's code does it; Trainer's would push another layout


def _dataset(fields: dict[str, str]) -> DatasetConfig:
    if "repo_id" not in fields:
        raise ValueError(
            "which data set? --dataset.repo_id=<Hub id>, with --dataset.root=<folder> a local one."
        )
    return parse_options(DatasetConfig, PROG, _arguments(fields))


def _evaluation(fields: dict[str, str], options: SFTOptions) -> list[str]:
    """Options of the evaluation, parsed once now: a mistake must not show after the training."""
    if not options.eval_after_train:
        if fields:
            raise ValueError(f"eval.{next(iter(fields))} has no effect without --eval_after_train.")
        return []
    suite = {"suites": options.train_suite} if options.train_suite else {}
    arguments = _arguments(suite | fields)
    parse_options(EvalConfig, PROG, ["--out=unused", *arguments])
    return arguments


def _print_help(parser_class: "type[TrlParser]", config_class: "type[SFTConfig]") -> None:
    ours = parser_class([SFTOptions], prog=PROG, usage=f"{PROG} [--config FILE.yaml] [--option value ...]")
    print(ours.format_help())
    print("LeRobot's, as for lerobot-train (`lerobot-train --policy.type=vla0 --help` explains them), and of")
    print("`lerobot-vla0 eval` for --eval_after_train; in the YAML file, mappings of these names:")
    for section in SECTIONS:
        names = [name for name in _fields(section) if name not in REFUSED[section]]
        print(f"\n--{section}.*\n" + textwrap.fill(" ".join(names), 100))
    print("\nTRL's SFTConfig (https://huggingface.co/docs/trl/sft_trainer), [default] where ours is another:")
    defaults = _defaults()
    for field in dataclasses.fields(config_class):
        if field.name not in WITHOUT_EFFECT:
            print(f"  --{field.name}" + (f"  [{defaults[field.name]}]" if field.name in defaults else ""))
