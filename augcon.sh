#!/usr/bin/env bash
# The whole method: a corpus becomes SFT data in results/sft_data. Stopped or failed, the same command goes on.
#
#   bash augcon.sh [FLAGS…]    every step gets the flags
#
# With NVIDIA GPUs, vLLM serves the model on all of them for steps 1 and 3, and they are free for step 2 between.
# With --api-base or AUGCON_API_BASE that server is asked, and none is started. With neither it is a demonstration.
set -euo pipefail
home="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
flags=("$@")
PATH="${VIRTUAL_ENV:-${CONDA_PREFIX:-$home/.venv}}/bin:$PATH"
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 # else a log lags behind

ask() { python -P -m augcon.run.plan "$@"; }
# Of what runs like this nothing stays when this script ends, however it ends.
alone() { python -P -m augcon.machine.processes "$@"; }
with_server() {
    if [ "$server" = given ]; then alone "$@"; else python "$home/serve.py" "${flags[@]}" -- "$@"; fi
}

for flag in "$@"; do
    if [ "$flag" = --help ] || [ "$flag" = -h ]; then
        sed -n '2,/^set /s/^# \{0,1\}//p' "$home/augcon.sh"
        settings="$(ask next --help 2>/dev/null)" || settings="options: to see them, run bash install.sh first"
        sed -n '/^options:/,$p' <<<"$settings"
        exit
    fi
done

bash "$home/install.sh"
way="$(ask way "$@")"
read -r server scorer gpus results <<<"$way"

ranks=(--num_gpus "$gpus") # of step 2
if [ "$gpus" = 0 ]; then
    cores="$(nproc)"
    ranks=(--num_gpus "$((cores > 1 ? 2 : 1))")
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}"
elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    ranks=() # deepspeed uses those, but only if it is told nothing else
fi

if [ "$server" = demo ]; then
    export AUGCON_DEMO=1
    echo "This is a DEMONSTRATION: questions and answers come from rules, not from an LLM, and show only the form."
    echo "The real thing: the same command on a machine with NVIDIA GPUs, or with --api-base http://SERVER/v1"
fi
if [ "$scorer" = tiny ]; then
    [ "$server" = demo ] ||
        echo "warning: no GPU to train the scorer on; a tiny random one ranks poorly, so name a small model with --scorer-model" >&2
    AUGCON_SCORER_MODEL="$(realpath -m -- "$results")/tiny_model" # from wherever it is called
    export AUGCON_SCORER_MODEL
    export AUGCON_SCORER_EPOCHS="${AUGCON_SCORER_EPOCHS:-1}"
    export AUGCON_SCORER_BATCH="${AUGCON_SCORER_BATCH:-8}"
    export AUGCON_SCORER_LEARNING_RATE="${AUGCON_SCORER_LEARNING_RATE:-3e-3}"
fi

before=""
while true; do
    step="$(ask next "$@")"
    if [ "$step" = "done" ]; then break; fi
    if [ "$step" = "$before" ]; then
        echo "error: step $step has ended without all that it should have made" >&2
        exit 1
    fi
    before="$step"
    began=$SECONDS
    echo
    case "$step" in
        1)
            echo "== Step 1: questions"
            with_server python "$home/step1_gen_q.py" "$@"
            ;;
        2)
            echo "== Step 2: scorer, rank and filter"
            if [ "$scorer" = tiny ] && [ ! -e "$AUGCON_SCORER_MODEL" ]; then
                python -P -m augcon.demo.tiny_model "$AUGCON_SCORER_MODEL.unfinished" >/dev/null
                mv "$AUGCON_SCORER_MODEL.unfinished" "$AUGCON_SCORER_MODEL"
            fi
            port="$(ask port)"
            alone deepspeed "${ranks[@]}" --master_port "$port" --quiet "$home/step2_scorer.py" "$@"
            ;;
        3)
            echo "== Step 3: answers"
            with_server python "$home/step3_gen_a.py" "$@"
            ;;
    esac
    echo "== $((SECONDS - began)) s"
done

next=(deepspeed finetune.py "$@")
if [ "$server" = demo ]; then next+=(--model "$results/tiny_model" --epochs 1); fi
echo
echo "The SFT data is in $results/sft_data. What comes next, in the folder of the project:"
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then echo "  source $home/.venv/bin/activate"; fi
echo " $(printf ' %q' "${next[@]}")"
