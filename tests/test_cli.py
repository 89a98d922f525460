import subprocess
import sys

import pytest

from lerobot_vla0.cli import COMMANDS, main


def test_help_lists_every_command(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_documents_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: lerobot-vla0 {name}" in shown and "--out" in shown


def test_help_is_light():
    """`lerobot-vla0 --help` imports neither transformers nor a simulator."""
    code = (
        "import sys; from lerobot_vla0.cli import main; main([]); "
        "print({'transformers', 'libero'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("set()")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["record"], "lerobot-vla0 record: .*out"),
        (
            ["record", "--out=nowhere", "--episodes=few"],
            "lerobot-vla0 record: `episodes`: .*'few' into an int",
        ),
        (["merge", "--policy.path=x", "--policy.type=act"], "both --policy.path and --policy.type"),
        (
            ["tiny-vlm", "--hidden_size=100", "--out=nowhere"],
            "lerobot-vla0 tiny-vlm: hidden_size=100 must be",
        ),
    ],
)
def test_user_errors_end_in_one_message(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_unknown_option(capsys):
    with pytest.raises(SystemExit):
        main(["tiny-vlm", "--frobnicate=1"])
    assert "--frobnicate" in capsys.readouterr().err
