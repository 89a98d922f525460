# Two commands do all the set-up on a machine with git, make and some Python 3 with pip:
#   make demo    record, train and evaluate a tiny model in the LIBERO simulation (CPU, no download of weights)
#   make test    the whole test suite; `make test-fast` leaves out what needs a simulator or a training process

SHELL := /bin/bash
# uv from PATH if it runs, else one of our own in .tools.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo $(CURDIR)/.tools/bin/uv)
RUN := $(UV) run --locked --all-extras
DEMO := outputs/demo
# LIBERO keeps absolute paths of its package in a config file: one per environment, not one per user.
export LIBERO_CONFIG_PATH ?= $(CURDIR)/.venv/libero
export UV

.PHONY: demo test test-fast lint setup render

demo: setup render
	@test ! -e $(DEMO) || { echo "$(DEMO) exists: remove it first (rm -r $(DEMO))."; exit 1; }
	$(RUN) lerobot-vla0 record --out=$(DEMO)/dataset --suite=libero_object --tasks=[0] --episodes=4 --assets=primitive
	$(RUN) lerobot-vla0 tiny-vlm --out=$(DEMO)/vlm
	$(RUN) lerobot-train --config_path=configs/demo_train.yaml
	$(RUN) lerobot-eval --policy.path=$(DEMO)/train/checkpoints/last/pretrained_model --policy.device=cpu \
		--env.type=vla0_libero --env.task=libero_object --env.task_ids=[0] --env.assets=primitive \
		--eval.batch_size=1 --eval.n_episodes=2 --output_dir=$(DEMO)/eval
	@echo
	@echo "checkpoint  $(DEMO)/train/checkpoints/last/pretrained_model"
	@echo "metrics     $(DEMO)/eval/eval_info.json"
	@echo "videos      $(DEMO)/eval/videos/libero_object_0/"

test: setup render
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pytest

test-fast: setup render
	$(RUN) pytest -m "not slow"

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
