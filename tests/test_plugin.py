"""What LeRobot needs to find us, and what the import must not cost."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT


def run_python(code: str, python: str = sys.executable, **kwargs) -> str:
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_import_is_light():
    code = """
import sys, lerobot_policy_vla0
heavy = ("transformers", "trl", "peft", "libero", "mujoco", "robosuite", "datasets")
print([name for name in heavy if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


REGISTRIES = """
from lerobot.envs.configs import EnvConfig
from lerobot.processor import ProcessorStepRegistry
from lerobot.configs import PreTrainedConfig
"""
DISCOVERY = """
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
"""


@pytest.mark.parametrize(
    "imports",
    [
        REGISTRIES + DISCOVERY,  # LeRobot's scripts
        *(
            pytest.param(first + REGISTRIES, marks=pytest.mark.slow)
            for first in (
                "import lerobot_vla0",
                "import lerobot_vla0.processor_vla0",
                "import lerobot_vla0.libero.env",
                "import lerobot_vla0.modeling_vla0",
                "from lerobot.processor import ProcessorStepRegistry; import lerobot_vla0",
            )
        ),
    ],
)
def test_registers_whatever_was_imported_before(imports):
    code = """
import sys
assert "vla0" in PreTrainedConfig.get_known_choices()
assert "vla0_libero" in EnvConfig.get_known_choices()
assert {"vla0_action_encoder_processor", "vla0_action_decoder_processor"} <= set(ProcessorStepRegistry.list())
assert "libero" not in sys.modules
# Another plugin, which discovery finds where the extra [sims] is installed, imports it.
assert "mujoco" not in sys.modules or "lerobot_env_so101" in sys.modules
"""
    run_python(imports + code)


def test_name_and_version():
    import lerobot_vla0

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "lerobot_policy_vla0"  # underscores: LeRobot imports the raw name
    assert project["version"] == lerobot_vla0.__version__


@pytest.mark.slow
def test_installed_wheel_is_discovered_in_a_fresh_environment(tmp_path):
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None or subprocess.run([uv, "--version"], capture_output=True).returncode:
        pytest.skip("uv is not installed")

    def run(*arguments, **kwargs):
        result = subprocess.run(
            [uv, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, **kwargs
        )
        assert result.returncode == 0, result.stderr

    python = tmp_path / "venv" / "bin" / "python"
    run("build", "--wheel", "--out-dir", tmp_path / "dist")
    run(
        "export",
        "--locked",
        "--no-emit-project",
        "--no-hashes",
        "--output-file",
        tmp_path / "requirements.txt",
    )
    run("venv", "--python", sys.executable, tmp_path / "venv")
    wheel = next((tmp_path / "dist").glob("lerobot_policy_vla0-*.whl"))
    run("pip", "install", "--python", python, "--requirements", tmp_path / "requirements.txt", wheel)
    # Outside the checkout, so that only what is installed can be imported; no extras, so without LIBERO.
    help_text = subprocess.run(
        [tmp_path / "venv" / "bin" / "lerobot-train", "--policy.type=vla0", "--help"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert help_text.returncode == 0, help_text.stderr
    assert "--policy.vlm" in help_text.stdout and "--policy.action_mask_prob" in help_text.stdout
    assert run_python(
        "import lerobot_vla0; print(lerobot_vla0.__file__)", str(python), cwd=tmp_path
    ).startswith(str(tmp_path))


@pytest.mark.slow
def test_every_module_imports_without_the_extras():
    """LeRobot's `--policy.discover_packages_path=lerobot_vla0` imports all direct sub-modules."""
    code = """
import importlib, pkgutil, sys
for extra in ("libero", "robosuite", "mujoco", "trl"):
    sys.modules[extra] = None  # importing it raises ImportError
import lerobot_vla0
for module in pkgutil.iter_modules(lerobot_vla0.__path__):
    importlib.import_module(f"lerobot_vla0.{module.name}")
# Nor may these: mujoco chooses how to render when it is first imported, and MUJOCO_GL must be set before.
for name in ("bench.eval", "libero.simulator"):
    importlib.import_module(f"lerobot_vla0.{name}")
"""
    run_python(code)
