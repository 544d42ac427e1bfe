#!/usr/bin/env bash
# Installs what is missing, then runs the linters and the tests. Arguments are passed on to pytest.
#
#   bash tests/run.sh                           the tests, a real vLLM server among them
#   bash tests/run.sh -m nightly                those that take ten minutes or more
#   bash tests/run.sh -m "not slow"             the fast ones
#   bash tests/run.sh tests/test_diversity.py   those of one file
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh --tests
PATH="${VIRTUAL_ENV:-${CONDA_PREFIX:-$PWD/.venv}}/bin:$PATH"

# Only what git tracks: a results folder may hold a checkpoint that comes with code of its own.
tracked() {
    git ls-files -- "$@" | while read -r file; do
        if [ -e "$file" ]; then echo "$file"; fi
    done
}
if git ls-files --error-unmatch tests/run.sh >/dev/null 2>&1; then
    mapfile -t python < <(tracked '*.py')
    mapfile -t shell < <(tracked '*.sh' .ci/run)
    ruff check "${python[@]}"
    ruff format --check "${python[@]}"
    shellcheck "${shell[@]}"
    mypy
else
    echo "not a git checkout, so the linters are skipped"
fi
python -m pytest "$@"
