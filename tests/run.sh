#!/usr/bin/env bash
# Installs what is missing, then runs the linters and all tests; further arguments go to pytest.
#
#   bash tests/run.sh                  everything (a real vLLM server included)
#   bash tests/run.sh -m "not slow"    the fast ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh --tests
PATH="${VIRTUAL_ENV:-${CONDA_PREFIX:-$PWD/.venv}}/bin:$PATH"
ruff check .
ruff format --check .
shellcheck ./*.sh tests/*.sh .ci/run
python -m pytest "$@"
