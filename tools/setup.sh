# Sourced by quickstart.sh and test.sh: makes .venv in the checkout and installs what is missing, with plain pip.
# A stamp keeps a second run from asking pip again while pyproject.toml and tools/constraints.txt stay as they were.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup() { # setup EXTRAS
    local python stamp
    # pip, not python: a venv whose making failed has the one without the other
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        for python in ${PYTHON:-python3 python3.13 python3.12 python3.11} ""; do
            [ -n "$python" ] || {
                echo "ldm needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
                exit 1
            }
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
        "$python" -m venv --clear .venv || {
            rm -rf .venv
            echo "could not make .venv; on Debian: apt-get install python3-venv" >&2
            exit 1
        }
    fi
    stamp=".venv/.installed-$(cat pyproject.toml tools/constraints.txt | sha256sum | cut -c1-16)-${1//,/-}"
    if [ ! -e "$stamp" ]; then
        echo "installing ldm[$1] into .venv (once, some minutes)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".[$1]"
        touch "$stamp"
    fi
}
