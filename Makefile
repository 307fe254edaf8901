# make demo, make test: all a newcomer types. Each makes .venv first where it is missing or out of date.

PYTHON ?= python3
# Which torch to install. Where torch==2.13.0 would bring CUDA and you want the CPU build, name the index of CPU builds:
#   make demo TORCH='torch==2.13.0 --index-url URL'
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VISION := .venv-vision

.PHONY: install demo pretrained test test-vision test-scale lint type bench wheel clean
.DELETE_ON_ERROR:

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about a minute)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@echo "torch is there; now the rest"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $(READY)

demo: install
	$(BIN)/dynrl demo

# A process for each of two cores; a file stays in one, since its tests share what takes long to make.
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The small models that come with the package, each by its own recipe. `make -B pretrained` makes them anew.
SHIPPED := skip-digits exit-digits expert-digits channel-digits hidden-update-sequential-digits model-digits unroll-hops jump-needle \
	look-digit-scenes positions-digits branch-digit-tasks
pretrained: $(SHIPPED:%=dynrl/pretrained/%/report.json)
dynrl/pretrained/skip-digits/%: RUN = skip --finetune --network 'widths=[8,16,32]'
dynrl/pretrained/exit-digits/%: RUN = exit --network 'widths=[8,16,32]'
dynrl/pretrained/expert-digits/%: RUN = expert --finetune --network stem=8 channels=32 'widths=[0,16,32,32,64,128]'
dynrl/pretrained/channel-digits/%: RUN = channel --finetune --network 'widths=[16,32,64]' 'layers=[2,2,2]'
dynrl/pretrained/hidden-update-sequential-digits/%: RUN = hidden-update --finetune
dynrl/pretrained/model-digits/%: RUN = model
dynrl/pretrained/unroll-hops/%: RUN = unroll --network steps=10 hidden=32
dynrl/pretrained/jump-needle/%: RUN = jump --data needle --finetune
dynrl/pretrained/look-digit-scenes/%: RUN = look
dynrl/pretrained/positions-digits/%: RUN = positions --data digits --finetune
dynrl/pretrained/branch-digit-tasks/%: RUN = branch --finetune
dynrl/pretrained/%/report.json: | install
	rm -rf build/pretrained/$*
	$(BIN)/dynrl train $(RUN) --out build/pretrained/$*
	mkdir -p $(@D)
	cd build/pretrained/$* && cp backbone.safetensors policy.safetensors config.json report.json $(CURDIR)/$(@D)

# Networks of torchvision, timm and transformers; apart, since torchvision fits one torch only and brings CUDA's gigabytes.
test-vision: $(VISION)/.ready
	$(VISION)/bin/python -m pytest tests/vision.py

# Several processes, some of them killed; and ten minutes of calls, or DYNRL_SOAK seconds of them.
test-scale: install
	$(BIN)/python -m pytest tests/scale.py

$(VISION)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm==1.0.31 \
		transformers==5.24.0 pytest onnxruntime
	$(VISION)/bin/python -m pip install --disable-pip-version-check -e '.[train,onnx]'
	@touch $(VISION)/.ready

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see folders mapped by setuptools in an editable install: check a tree laid out as the wheel.
type: install
	rm -rf build/tree
	mkdir -p build/tree
	$(BIN)/python scripts/lay_out.py build/tree
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p dynrl

bench: install
	$(BIN)/dynrl bench env

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(VISION) build dist *.egg-info
