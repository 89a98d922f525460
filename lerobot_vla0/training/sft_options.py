"""Options of `lerobot-vla0 sft`, from a YAML file and the command line.

    --learning_rate 1e-5 --max_steps 1000       TRL's SFTConfig, and the few of `SFTOptions`
    --policy.image_size=224 --dataset.root=...  LeRobot's, as for lerobot-train
    --eval.episodes=10                          those of `lerobot-vla0 eval`, for --eval_after_train

In the YAML file, `policy:`, `dataset:` and `eval:` are mappings and everything else stands at the top. The
command line overrides the file, the file overrides the defaults.

TRL's parser, an argparse parser, takes all of them. It cannot make LeRobot's nested configs, so it collects
the options of a section as text, and LeRobot's parser, draccus, makes the config of them. draccus alone would
not do: it wants a value after every option (--use_cpu has none) and lists in brackets.
"""

import argparse
import difflib
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from lerobot.configs.default import DatasetConfig
from transformers.hf_argparser import HfArg
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, TrlParser

from ..configuration_vla0 import VLA0Config
from ..files import reading
from ..libero.evaluate import EvalConfig
from ..options import load_policy_config, parse_options

PROG = "lerobot-vla0 sft"
SECTIONS = {"policy": VLA0Config, "dataset": DatasetConfig, "eval": EvalConfig}

# Fields of the policy's config that options of SFTConfig set: the checkpoint says how it was trained.
FROM_TRL = {
    "gradient_checkpointing": "gradient_checkpointing",
    "optimizer_lr": "learning_rate",
    "optimizer_eps": "adam_epsilon",
    "optimizer_weight_decay": "weight_decay",
    "optimizer_grad_clip_norm": "max_grad_norm",
    "push_to_hub": "push_to_hub",
    "repo_id": "hub_model_id",
    "private": "hub_private_repo",
}
# Options with which SFTConfig prepares text data, loads models and writes Hub repos.
FOR_TEXT = (
    "dataset_text_field", "dataset_kwargs", "dataset_num_proc", "max_length", "truncation_mode", "eos_token",
    "packing", "packing_strategy", "eval_packing", "padding_free", "shuffle_dataset", "remove_unused_columns",
    "completion_only_loss", "assistant_only_loss", "model_init_kwargs", "chat_template_path", "pad_token",
    "pad_to_multiple_of", "trust_remote_code", "length_column_name",
    "hub_strategy", "hub_token", "hub_always_push", "hub_revision",
)  # fmt: skip
# Those with which Trainer evaluates while it trains.
FOR_EVALUATION = (
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
# Options of LeRobot and TRL that would be ignored here, and what to do instead.
WITHOUT_EFFECT = {
    **{f"policy.{field}": f"use --{option}" for field, option in FROM_TRL.items()},
    "policy.device": "use --use_cpu",
    "policy.optimizer_betas": "use --adam_beta1 and --adam_beta2",
    "policy.scheduler_warmup_steps": "use --warmup_steps",
    **dict.fromkeys(["policy.scheduler_decay_steps", "policy.scheduler_decay_lr"], "use --lr_scheduler_type"),
    "policy.use_peft": "use --use_lora",
    "policy.pretrained_path": "use --policy.path",
    "dataset.eval_split": "lerobot-train evaluates on held-out episodes",
    "dataset.return_uint8": "pictures are always read so. Leave it out",
    "dataset.depth_output_unit": "depth cameras are not shown. Leave it out",
    "eval.policy": "the final checkpoint is evaluated",
    "eval.out": "results go to <output_dir>/eval",
    **dict.fromkeys(FOR_TEXT, "examples are made by the policy. Leave it out"),
    **dict.fromkeys(FOR_EVALUATION, "nothing is evaluated before the end. Use --eval_after_train"),
}
# Where TRL's defaults are not the published recipe, or would write large checkpoints too often.
DEFAULTS = {
    **{FROM_TRL[f]: getattr(VLA0Config, f) for f in FROM_TRL if f.startswith("optimizer_")},
    "adam_beta1": VLA0Config.optimizer_betas[0],
    "adam_beta2": VLA0Config.optimizer_betas[1],
    "output_dir": "outputs/sft",
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


@dataclass
class SFTOptions:
    """What neither TRL nor LeRobot has. The defaults of LoRA are those of TRL's ModelConfig."""

    train_suite: str | None = HfArg(
        default=None,
        help="Train on the episodes of this LIBERO suite only, told by their tasks: libero_spatial, "
        "libero_object, libero_goal, libero_10, libero_90, or several separated by commas.",
    )
    max_episodes: int | None = HfArg(default=None, help="Train on the first N episodes (of those left).")
    rename_map: dict[str, str] | str | None = HfArg(  # noqa: RUF009 (a field, not a value)
        default=None, help="'{camera in the data set: camera of the checkpoint at --policy.path, ...}'."
    )
    use_lora: bool = HfArg(default=False, help="Train LoRA adapters, not the model itself (needs peft).")
    lora_r: int = HfArg(default=16, help="Rank of the adapters.")
    lora_alpha: int = HfArg(default=32, help="Adapters are scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout before the adapters.")
    lora_target_modules: list[str] | None = HfArg(  # noqa: RUF009 (a field, not a value)
        default=None, help="Ends of the names of the modules to adapt; default: the policy's own choice."
    )
    eval_after_train: bool = HfArg(
        default=False, help="Evaluate the final checkpoint on LIBERO; success rates go to report_to."
    )

    def __post_init__(self) -> None:
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"max_episodes={self.max_episodes} must be at least 1.")
        if any("lm_head" in name for name in self.lora_target_modules or []):
            raise ValueError(
                "lora_target_modules names lm_head: TRL computes the loss from its plain weights, so an "
                "adapter there would never be trained. Leave it out."
            )
        if not self.use_lora:
            self.refuse_lora("without --use_lora")
        given = self.rename_map or {}
        try:
            names = yaml.safe_load(given) if isinstance(given, str) else given
        except yaml.YAMLError:
            names = None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"rename_map={given!r} must be '{{name in the data set: new name, ...}}'.")
        self.rename_map = names

    def refuse_lora(self, where: str) -> None:
        """Raises ValueError if an option of LoRA was given, which `where` ignores."""
        for field in fields(self):
            if field.name in LORA and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}={getattr(self, field.name)!r} has no effect {where}.")


@dataclass
class Arguments:
    """Everything that was asked for; `evaluation` is None without --eval_after_train."""

    options: SFTOptions
    training: SFTConfig
    policy: VLA0Config
    dataset: DatasetConfig
    evaluation: EvalConfig | None


def parse(argv: list[str]) -> Arguments:
    """Options of the command line and of the YAML file that `--config` names.

    Raises:
        FileNotFoundError: the YAML file is not there.
        ValueError: an option that does not exist (names the nearest), one without effect, or a bad value.
    """
    file_parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="Read options from this file.")
    if {"-h", "--help"} & set(argv):
        _print_help(file_parser)
        sys.exit(0)
    parser = TrlParser(
        [SFTOptions, SFTConfig],
        prog=PROG,
        usage=f"{PROG} [--config FILE.yaml] [--option value ...]   (--help lists the options)",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    in_sections = [name for section in SECTIONS for name in _options_of(section)]
    for name in in_sections:
        section = name.partition(".")[0]
        parser.add_argument(f"--{name}", dest=section, action=_SectionOption, nargs="?", default={})

    file, argv = file_parser.parse_known_args(argv)
    if file.config:
        content = _read(file.config)
        names = [*content, *(f"{section}.{field}" for section in SECTIONS for field in content[section])]
        _check(names, [*(action.dest for action in parser._actions), *in_sections], f" in {file.config}")
        parser.set_defaults_with_config(**content)
    options = [option for action in parser._actions for option in action.option_strings]
    names = [token[2:].partition("=")[0] for token in argv if token.startswith("--")]
    _check(names, [option.removeprefix("--") for option in options])
    given, rest = parser.parse_known_args(argv)
    if rest:
        raise ValueError(f"{rest[0]!r} is no option: write --option value.")

    bf16 = is_torch_bf16_gpu_available() and not given.use_cpu and not given.fp16
    policy = _policy(given.policy, "bfloat16" if bf16 else "float32")
    if given.bf16 is None:
        given.bf16 = bf16 and policy.dtype == "bfloat16"
    options, training = parser.parse_dict(vars(given), allow_extra_keys=True)
    if training.push_to_hub and not training.hub_model_id:
        raise ValueError("push_to_hub needs a repo to push to: --hub_model_id=<you>/<name>.")
    if policy.use_peft:
        options.refuse_lora(f"on the adapter policy.path={str(policy.pretrained_path)!r}, which has its own")
    _copy_to_policy(training, policy)
    dataset = _dataset(given.dataset)
    return Arguments(options, training, policy, dataset, _evaluation(given.eval, options, training))


class _SectionOption(argparse.Action):
    """Adds `--policy.image_size 84` as {"image_size": "84"} to `policy`, at first the file's mapping."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str = "") -> None:
        if value is None:
            raise ValueError(f"{option_string} has no value.")
        field = option_string.partition(".")[2]
        setattr(namespace, self.dest, getattr(namespace, self.dest) | {field: value})


def _options_of(section: str) -> list[str]:
    """Names of the options of a section, nested ones too: policy.vlm, dataset.image_transforms.enable, ..."""

    def names(config_class: type, prefix: str) -> Iterator[str]:
        for field in fields(config_class):
            yield prefix + field.name
            if is_dataclass(field.type):
                yield from names(field.type, f"{prefix}{field.name}.")

    first = ["policy.type", "policy.path"] if section == "policy" else []
    return [n for n in (*first, *names(SECTIONS[section], f"{section}.")) if n not in WITHOUT_EFFECT]


def _read(file: Path) -> dict[str, Any]:
    """Options of a YAML file: {option: value, section: {field: value as on the command line}}.

    TRL's parser can read a file, but knows nothing of sections and names neither it nor the nearest option.
    """
    if not file.is_file():
        raise FileNotFoundError(f"config={str(file)!r}: there is no such file.")
    with reading(file):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{file} must hold `option: value` lines.")
    for section in ("env", *SECTIONS):
        mapping = content.pop(section, None) or {}
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
            raise ValueError(f"{file}: {section} must be a mapping, got {mapping!r}.")
        if section == "env":  # as TRL's parser does when it reads a file itself
            os.environ.update({key: str(value) for key, value in mapping.items()})
        else:
            as_text = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in mapping.items()}
            content[section] = as_text
    return content


def _check(names: list[str], known: list[str], where: str = "") -> None:
    """Refuses options that do not exist or would be ignored.

    By hand, because argparse would say neither which is the nearest nor what to use instead.
    """
    for name in names:
        option = ".".join(name.replace("-", "_").split(".")[:2])
        if option in WITHOUT_EFFECT:
            raise ValueError(f"{option} has no effect here: {WITHOUT_EFFECT[option]}.")
        if name not in known:
            useful = [option for option in known if option not in WITHOUT_EFFECT]
            nearest = difflib.get_close_matches(name, useful, n=1, cutoff=0)[0]
            raise ValueError(f"unknown option {name!r}{where}. The nearest is {nearest!r}; --help lists all.")


def _policy(mapping: dict[str, str], dtype: str) -> VLA0Config:
    """The config of `policy:`, new or that of the checkpoint `path`; `dtype` is the default of a new one."""
    kind, path = mapping.pop("type", "vla0"), mapping.pop("path", None)
    if kind != "vla0":
        raise ValueError(
            f"policy.type={kind!r}: this trains vla0 only. lerobot-train trains LeRobot's others."
        )
    if path is None:
        return parse_options(VLA0Config, PROG, _arguments({"dtype": dtype} | mapping))
    return load_policy_config(path, _arguments(mapping))


def _copy_to_policy(training: SFTConfig, config: VLA0Config) -> None:
    """Writes into the policy's config how it is trained."""
    for field, option in FROM_TRL.items():
        setattr(config, field, getattr(training, option))
    config.optimizer_betas = (training.adam_beta1, training.adam_beta2)
    config.device = training.device.type
    training.push_to_hub = False  # Trainer's own push would write another layout


def _dataset(mapping: dict[str, str]) -> DatasetConfig:
    if "repo_id" not in mapping:
        raise ValueError(
            "which data set? --dataset.repo_id=<Hub id>, with --dataset.root=<folder> a local one."
        )
    return parse_options(DatasetConfig, PROG, _arguments(mapping))


def _evaluation(mapping: dict[str, str], options: SFTOptions, training: SFTConfig) -> EvalConfig | None:
    """Config of the evaluation after training, without the policy: a mistake must show before training."""
    if not options.eval_after_train:
        if mapping:
            raise ValueError(f"eval.{next(iter(mapping))} has no effect without --eval_after_train.")
        return None
    suite = {"suites": options.train_suite} if options.train_suite else {}
    out = {"out": str(Path(training.output_dir) / "eval")}
    return parse_options(EvalConfig, PROG, _arguments(out | suite | mapping))


def _arguments(mapping: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in mapping.items()]


def _print_help(file_parser: argparse.ArgumentParser) -> None:
    """Ours are explained; of LeRobot's and TRL's, which would fill many screens, the names are listed."""
    usage = f"{PROG} [--config FILE.yaml] [--option value ...]"
    print(TrlParser([SFTOptions], prog=PROG, usage=usage, parents=[file_parser]).format_help())
    print("LeRobot's, as for lerobot-train (`lerobot-train --policy.type=vla0 --help` explains them), and of")
    print("`lerobot-vla0 eval` for --eval_after_train; in the YAML file, mappings of these names:")
    for section in SECTIONS:
        names = [name.removeprefix(f"{section}.") for name in _options_of(section)]
        print(f"\n--{section}.*\n" + textwrap.fill(" ".join(names), 100))
    print("\nTRL's SFTConfig (https://huggingface.co/docs/trl/sft_trainer), [default] where ours is another:")
    for field in fields(SFTConfig):
        if field.name not in WITHOUT_EFFECT:
            print(f"  --{field.name}" + (f"  [{DEFAULTS[field.name]}]" if field.name in DEFAULTS else ""))
