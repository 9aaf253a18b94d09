#!/usr/bin/env bash
# The whole path on a fresh machine: installs into .venv, then runs `ldm quickstart` with the options given here.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup quickstart
exec .venv/bin/ldm quickstart "$@"
