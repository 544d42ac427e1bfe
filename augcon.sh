#!/usr/bin/env bash
# The whole method: turns a corpus into SFT data in results/sft_data. After a stop or a failure, the same command
# continues where it was.
#
#   bash augcon.sh [SETTING …]    every step gets the settings
#
# With NVIDIA GPUs, vLLM serves the model on all of them for steps 1 and 3, and step 2 has them in between. With
# --api-base or AUGCON_API_BASE, that server is asked and none is started. With neither, it is a demonstration.
set -euo pipefail
home="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
settings=()
while [ $# -gt 0 ]; do # a key goes on in the environment: commands are shown, by this script and by others
    case "$1" in
        --api-key) export AUGCON_API_KEY="${2-}" && shift ;;
        --api-key=*) export AUGCON_API_KEY="${1#*=}" ;;
        *) settings+=("$1") ;;
    esac
    [ $# = 0 ] || shift
done
PATH="${VIRTUAL_ENV:-${CONDA_PREFIX:-$home/.venv}}/bin:$PATH"
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 # else a log lags behind

plan() { python -P -m augcon.plan "$@" "${settings[@]}"; }
# Runs a command of which nothing stays when this script ends, however it ends.
contained() { python -P -m augcon.machine.processes "$@"; }
with_server() {
    if [ "$server" = given ]; then contained "$@"; else python "$home/serve.py" "${settings[@]}" -- "$@"; fi
}

next_step() { # sets step to the number of the first one that has something to do, if there is any
    step="$(plan next)" || exit 1
    [ "$step" != none ]
}

make_queries() { with_server python "$home/step1_gen_q.py" "${settings[@]}"; }
make_answers() { with_server python "$home/step3_gen_a.py" "${settings[@]}"; }
score_queries() {
    if [ "$scorer" = tiny ] && [ ! -e "$AUGCON_SCORER_MODEL" ]; then
        python -P -m augcon.demo.tiny_model "$AUGCON_SCORER_MODEL.unfinished" >/dev/null
        mv "$AUGCON_SCORER_MODEL.unfinished" "$AUGCON_SCORER_MODEL"
    fi
    local ranks=(--num_gpus "$gpus")
    if [ "$gpus" = 0 ]; then
        local cores
        cores="$(nproc)"
        ranks=(--num_gpus "$((cores > 1 ? 2 : 1))")
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}"
    elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        ranks=() # deepspeed uses those, but only if it is told nothing else
    fi
    local port
    port="$(python -P -c 'from augcon.machine.server import free_port; print(free_port())')"
    contained deepspeed "${ranks[@]}" --master_port "$port" --quiet "$home/step2_scorer.py" "${settings[@]}"
}

for setting in "${settings[@]}"; do
    if [ "$setting" = --help ] || [ "$setting" = -h ]; then
        sed -n '2,/^set /s/^# \{0,1\}//p' "$home/augcon.sh"
        help="$(plan way 2>/dev/null)" || help="options: to see them, run bash install.sh first"
        sed -n '/^options:/,$p' <<<"$help"
        exit
    fi
done

bash "$home/install.sh"
way="$(plan way)"
read -r server scorer gpus run results <<<"$way"
if [ "$server" = demo ]; then
    export AUGCON_DEMO=1
    echo "This is a DEMONSTRATION: queries and answers come from rules, not from an LLM, and show only the form."
    echo "For real data, run the same command on a machine with NVIDIA GPUs, or with --api-base http://SERVER/v1"
fi
if [ "$scorer" = tiny ]; then
    if [ "$server" != demo ]; then
        echo "warning: no GPU to train the scorer on, so a tiny random model ranks the queries, and ranks them poorly;" \
            "name a small model with --scorer-model" >&2
    fi
    AUGCON_SCORER_MODEL="$(realpath -m -- "$results")/tiny_model" # from wherever it is called
    export AUGCON_SCORER_MODEL
    export AUGCON_SCORER_EPOCHS="${AUGCON_SCORER_EPOCHS:-1}"
    export AUGCON_SCORER_BATCH="${AUGCON_SCORER_BATCH:-8}"
    export AUGCON_SCORER_LEARNING_RATE="${AUGCON_SCORER_LEARNING_RATE:-3e-3}"
fi
plan check
if [ "$run" = dry ]; then
    make_queries # a trial, which goes on to answers
    exit
fi

last=none
while next_step; do # step 2 may send root contexts back to step 1
    if [ "$step" = "$last" ]; then
        echo "error: step $step ended without everything that it should have made" >&2
        exit 1
    fi
    began=$SECONDS
    case "$step" in
        1) title=queries work=make_queries ;;
        2) title="scorer, rank and filter" work=score_queries ;;
        3) title=answers work=make_answers ;;
    esac
    printf '\n== Step %s: %s\n' "$step" "$title"
    "$work"
    echo "== $((SECONDS - began)) s"
    last=$step
done

report="$results/report.html"
if [ "$last" != none ] || [ ! -e "$report" ]; then
    if ! python "$home/report.py" "${settings[@]}"; then
        echo "warning: the report could not be written, as said above; the data is complete without it" >&2
        report=""
    fi
fi

next=(deepspeed "$home/finetune.py")
for setting in "${settings[@]}"; do
    if [ "$setting" != --redo ]; then next+=("$setting"); fi # agreed to already, and only for the steps above
done
if [ "$server" = demo ]; then next+=(--model "$results/tiny_model" --epochs 1); fi
echo
echo "The SFT data is in $results/sft_data.${report:+ See and review it in $report.} To fine-tune a model on it:"
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then echo "  source $home/.venv/bin/activate"; fi
echo " $(printf ' %q' "${next[@]}")"
