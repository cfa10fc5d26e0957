# People and CI run the same targets. `make install` first, or let the others do it.

PYTHON ?= python3
EXPERIMENT ?= experiments/digits.yaml

# Which torch. Empty index: whatever pip offers. For the CPU build or another CUDA, set TORCH_INDEX
# to the wheel index that pytorch.org's install page names. Remove .venv before changing either: pip
# takes another build of the same version for the same thing.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

.PHONY: install demo results test e2e e2e-cluster check bench system soak

install: .venv/.installed

# torch goes first and without the constraints: its own index has few versions of anything else.
# The second call brings what torch needs to the constrained versions. Python compiles what is
# loaded, the first time; to compile all of it took half of the installation.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	.venv/bin/pip install --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	.venv/bin/python experiments/fetch.py --for $(EXPERIMENT)
	.venv/bin/lepton-ray run $(EXPERIMENT)

# Every experiment whose data are here, with three seeds; writes the table of experiments/README.md.
results: install
	.venv/bin/python experiments/results.py

# What tests/unit/test_cluster_clouds.py asks as the clouds' own libraries would; a quarter of a gigabyte.
.venv/.clouds: .venv/.installed
	.venv/bin/pip install --no-compile -c constraints.txt -e '.[gcp,azure]'
	@touch $@

test: install .venv/.clouds
	.venv/bin/pytest tests/unit -n 2 --dist loadfile
	.venv/bin/pytest tests/ray

# -v names a test that failed also where the time is over before the others are.
e2e: install
	.venv/bin/pytest tests/ray -m "slow and not soak"
	.venv/bin/pytest tests/e2e -n 2 --dist loadfile --no-loadscope-reorder -v

# `ray up`, jobs, power cuts and `ray down` on machines in namespaces of this one; needs root.
e2e-cluster: install
	.venv/bin/pytest tests/e2e -m cluster -s

check: install
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: install
	@set -e; for file in $(BENCHMARKS); do \
		echo "$$file --quick"; .venv/bin/python $$file --quick; \
	done

# The schedules of joining, leaving and dying replicas that `make test` leaves out.
soak: install
	.venv/bin/pytest tests/unit tests/e2e -m soak
	.venv/bin/pytest tests/ray -m soak

# Debian packages that the tests use and pip cannot bring; those that are here stay as they are.
system:
	@set -e; packages=; \
	for name in $$(sed 's/#.*//' system-packages.txt); do \
		dpkg -s $$name >/dev/null 2>&1 || packages="$$packages $$name"; \
	done; \
	if [ -z "$$packages" ]; then echo "all of system-packages.txt is here"; exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then as_root=; else as_root=sudo; fi; \
	$$as_root apt-get update; \
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$packages
