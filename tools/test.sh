#!/usr/bin/env bash
# Installs into .venv, then ruff and the test suite; further options go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup quickstart,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
