#!/usr/bin/env bash
# Makes .venv and installs the project into it, at the versions in constraints.txt:
#
#   scripts/bootstrap.sh                     # or make venv; every make target runs it first
#   PYTHON=python3.13 scripts/bootstrap.sh   # with a Python of your choice
#
# .venv/.installed holds a fingerprint of what was installed; while it matches, this script does nothing. .venv/.installing
# exists while a set-up runs. Found at the start, that set-up was cut short and the environment is made anew, since pip
# takes a half-unpacked package for an installed one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'bootstrap: %s\n' "$*" >&2; }

# Prints the interpreter behind "$1" if it really runs (pyenv leaves shims that don't), is new enough and can make
# environments (Debian packages ensurepip apart). The one behind, because "$1" may live in the very .venv to be replaced.
working_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(1) if sys.version_info < (3, 12) else print(sys._base_executable)' \
        2>/dev/null
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        working_python "$PYTHON" && return
        say "PYTHON=$PYTHON does not run, is older than 3.12 or lacks venv; looking for another"
    fi
    local candidate pyenv=${PYENV_ROOT:-$HOME/.pyenv}/versions
    for candidate in python3.12 python3.13 python3 "$pyenv"/3.12*/bin/python "$pyenv"/3.13*/bin/python; do
        working_python "$candidate" && return
    done
    say "found no Python >= 3.12 that runs: tried python3.12, python3.13, python3 and pyenv's versions. Install one with its" \
        "venv module (for example 'apt install python3.12-venv' or 'pyenv install 3.12'), or name one:" \
        "make venv PYTHON=/path/to/python3.12"
    return 1
}

# The folder counts too: in a moved or copied checkout an editable install would still import the original.
# -S: without site-packages this takes 20 ms.
fingerprint() {
    .venv/bin/python -IS -c '
import hashlib, os, sys
print(hashlib.sha256(b"".join(open(path, "rb").read() for path in sys.argv[1:]) + os.getcwd().encode()).hexdigest())
' pyproject.toml constraints.txt
}

installed() {
    [[ -s .venv/.installed && ! -e .venv/.installing ]] && [[ $(fingerprint 2>/dev/null) == "$(<.venv/.installed)" ]]
}

remove_broken() {
    local pid
    if [[ -e .venv/.installing ]]; then
        pid=$(<.venv/.installing)
        if [[ -n $pid ]] && kill -0 "$pid" 2>/dev/null; then
            say "process $pid is setting up .venv; try again when it is done (or remove .venv/.installing if it is not)"
            return 1
        fi
        say "the last set-up was cut short; making .venv anew"
    elif working_python .venv/bin/python >/dev/null && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return
    elif [[ -e .venv || -L .venv ]]; then
        say ".venv has no working Python >= 3.12 with pip; making it anew"
    fi
    rm -rf .venv
}

installed && exit
remove_broken

# An interrupted pip may return as if it had merely failed, so that without this the script would go on.
trap 'exit 130' INT TERM

if [[ ! -e .venv ]]; then
    python=$(find_python)
    mkdir .venv
    echo $$ >.venv/.installing
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
echo $$ >.venv/.installing
rm -f .venv/.installed

say "installing the versions in constraints.txt; torch and its CUDA libraries are large, so the first time takes minutes"
# -qq: errors only; -q still prints a warning for every local index that lacks a package.
if ! .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,export,serve]'; then
    rm .venv/.installing # pip failed by itself and undid what it had begun: what was there is still good
    say "pip failed, see above"
    exit 1
fi
fingerprint >.venv/.installed
rm .venv/.installing
say "ready after $SECONDS s"
