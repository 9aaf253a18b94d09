#!/usr/bin/env bash
# Installs into .venv, then runs ruff, codespell, pyright and the tests on all cores. Options go to pytest (-n 0: one process).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup quickstart,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/codespell
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright --pythonpath .venv/bin/python  # the pinned one, though newer ones exist
# worksteal: an idle worker takes tests of another in the order of the files, so that few module fixtures are made twice
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
