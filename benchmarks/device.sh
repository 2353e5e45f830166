#!/usr/bin/env bash
# On a GPU within ten minutes, at LLaMA-7B's shapes with random weights: compression by three methods (two depths, and a line through
# them), the statistics pass, decompositions beside the published route, inference, the latent cache; then the table of what must hold.
#
#   benchmarks/device.sh [FOLDER]
#
# Results are JSON lines in FOLDER (device-results). DEVICE=cpu QUICK=1 runs every step with tiny shapes, without a GPU.
# PYTHON names the interpreter. A step that takes longer than its share is stopped; its rows are "not measured".
set -uo pipefail
DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} PYTHON=${PYTHON:-python} SECONDS=0
out=$(realpath -m "${1:-device-results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ $DEVICE == cuda* ]] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "$0: torch sees no GPU here; DEVICE=cpu QUICK=1 tries every step with tiny shapes." >&2
    exit 2
fi
mkdir -p "$out" || exit 2
rm -f "$out"/{scale,calibrate,decompose,infer,cache}.jsonl
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
if [[ $QUICK ]]; then
    shapes="64x64 96x64" preset=quick text="" model=mini-llama-s large=mini-llama-s
    few="--count 2 --length 32" patience=10 blocks="" fewer="" held="--held 32 --new 4" prompt="--prompt 16 --new 4 --repeat 1"
else
    shapes="4096x4096 11008x4096" preset=7b-block text="--count 256 --length 2048" large=7b
    model=$scratch/models/d4096-ff11008-v32000-2 few="--calibration random --count 16 --length 2048"
    patience=1 blocks="--blocks 4" fewer="--blocks 4" held="" prompt=""
fi

step() { # share of the time in seconds, name of the benchmark, its arguments
    local share=$(($1 * patience)) name=$2
    shift 2
    echo "[$SECONDS s] $name $*"
    timeout "$share" "$PYTHON" -m "benchmarks.$name" "$@" --device "$DEVICE" --out "$out/$name.jsonl" > "$scratch/said" 2>&1
    local code=$?
    if ((code == 124)); then
        echo "$name was stopped after its share of $share s"
    elif ((code)); then
        echo "$name ended with $code:"
        tail -n 5 "$scratch/said"
    fi
}

# shellcheck disable=SC2086 # the options are meant to fall apart
{
    for method in "90 asvd-1" "70 nsvd-1" "180 best"; do  # the first one makes the models
        step ${method% *} scale --preset $preset $text --methods ${method#* } --sources folder \
            --models "$scratch/models" --scratch "$scratch"
    done
    step 30 calibrate "$model" $few
    step 70 decompose --shapes $shapes
    step 40 infer $large $prompt --ratios 0.5 --dtypes bfloat16
    step 90 infer $large $prompt $blocks --ratios 0.5 --dtypes bfloat16 --compile
    step 30 cache $large $fewer $held
}
echo "[$SECONDS s] results are in $out"
"$PYTHON" -m benchmarks.table "$out"
