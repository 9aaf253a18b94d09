#!/usr/bin/env bash
# Installs into .venv, then ruff and the test suite on all cores; further options go to pytest, -n 0 for one process alone.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup quickstart,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# a core that is out of tests takes some of another one's, in the order of the files: few fixtures of a module are made twice
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
