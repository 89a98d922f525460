"""What the READMEs say of files, commands and settings exists."""

import dataclasses
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest
from conftest import ROOT
from lerobot.configs import PreTrainedConfig

from lerobot_vla0 import VLA0Config
from lerobot_vla0.cli import COMMANDS
from lerobot_vla0.libero import VLA0LiberoEnv

PACKAGE = ROOT / "lerobot_vla0"
README = ROOT / "README.md"
READMES = [
    README,
    *(
        file
        for part in ("lerobot_vla0", "configs", "examples")
        for file in sorted((ROOT / part).rglob("README.md"))
    ),
]
CODE_BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
every_readme = pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))


def section(name: str) -> str:
    """Text of the main README under a heading."""
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", README.read_text(), re.DOTALL | re.MULTILINE)[1]


def code_spans(text: str) -> list[str]:
    """Inline code of Markdown."""
    return re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", text))


def command_lines(file: Path) -> list[str]:
    """Lines of code blocks, and inline code; of both, those that call `lerobot-vla0`."""
    text = file.read_text()
    lines = "".join(CODE_BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", x) for x in [*lines, *code_spans(text)] if re.match(r"lerobot-vla0 [a-z]", x)]


def command_name(line: str) -> str | None:
    words = line.removeprefix("lerobot-vla0 ").split(" ")
    return next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)


def headings(file: Path) -> set[str]:
    """Anchors of a Markdown file, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every_readme
def test_links_and_images_lead_somewhere(file):
    for link in re.findall(r"\]\(([^)]+)\)", file.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@every_readme
def test_files_and_modules_exist(file):
    text = file.read_text()
    for path in re.findall(r"\b(?:tests|configs)/\w+\.\w+", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m (lerobot_vla0[\w.]*)", text):
        assert find_spec(module) is not None, module


@every_readme
def test_commands_and_their_options_exist(file):
    for line in command_lines(file):
        name = command_name(line)
        assert name is not None, line
        function = resolve_name(f"lerobot_vla0.{COMMANDS[name][0]}")
        (parameter,) = inspect.signature(function).parameters.values()
        if not dataclasses.is_dataclass(parameter.annotation):  # options of TRL or argparse
            continue
        known = {field.name for field in dataclasses.fields(parameter.annotation)} | {"config_path"}
        assert set(re.findall(r" --(\w+)", line)) <= known, line


def test_table_of_commands_is_complete():
    assert set(re.findall(r"^\| `([\w -]+)` \|", section("Commands"), re.MULTILINE)) == set(COMMANDS)


@every_readme
@pytest.mark.parametrize(("option", "config"), [("policy", VLA0Config), ("env", VLA0LiberoEnv)])
def test_settings_exist(file, option, config):
    parsers_own = {"path", "type", "discover_packages_path"}  # of LeRobot's parser
    text, settings_of = file.read_text(), {}
    for span in code_spans(text):
        # Another policy's are in one code span with its --policy.type.
        if option == "policy" and (other := re.search(r"--policy\.type=(?!vla0\b)(\w+)", span)):
            settings_of[span] = PreTrainedConfig.get_choice_class(other[1])
            text = text.replace(span, "")
    for part, of in (settings_of | {text: config}).items():
        known = {field.name for field in dataclasses.fields(of)} | parsers_own
        assert set(re.findall(rf"--{option}\.(\w+)", part)) <= known, of
