#!/usr/bin/env bash
# Measures what docs/backends.md says of a GPU: the main job, gradients against backpropagation, rates beside
# inference (and PyTorch, where python3 has it), and what a step launches.
#
#   scripts/measure-gpu.sh build          compiles all of it; needs no GPU, and the crates registry
#   scripts/measure-gpu.sh run [FOLDER]   runs it in about ten minutes, into FOLDER (artifacts/gpu)
#
# It runs on CUDA in f32 and bf16, and once more through Vulkan on the same card. SETS names other sets of
# features, such as "cuda" or, to try the script on a CPU, "flex". A step that takes too long is stopped, and
# the next one begins; summary.txt says how each of them ended.
set -euo pipefail
out=$(realpath -m "${2:-$(dirname "${BASH_SOURCE[0]}")/../artifacts/gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read -ra sets <<<"${SETS:-cuda cuda,bf16 wgpu}"
job=${1:-}

# Each set has a target folder of its own: a run compiles nothing again.
cargo_of() {
    local set=$1
    shift
    CARGO_TARGET_DIR=target/gpu/${set/,/-} cargo "$@"
}

# The counter of launches reads the log of wgpu.
has_launches() { [[ $1 == wgpu ]]; }

build() {
    for set in "${sets[@]}"; do
        cargo_of "$set" build --release -p flops-examples --example vit_cifar --features "$set"
        cargo_of "$set" test --release -p flops-benches --lib --no-run --features "$set"
        if has_launches "$set"; then
            cargo_of "$set" build --release -p flops-benches --bin launches --features "$set"
        else
            cargo_of "$set" build --release -p flops-benches --bin table --features "$set"
        fi
    done
}

failed=0
# `step NAME SECONDS COMMAND...` runs COMMAND for so long at most, and keeps what it prints.
step() {
    local name=$1 limit=$2 start=$SECONDS how=passed
    shift 2
    echo "$name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { how="failed with $?"; failed=1; }
    echo "$name: $how after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

run() {
    mkdir -p "$out"
    rm -f "$out/summary.txt"
    if command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/device.txt"
    fi
    local dtype rates=(--rates-only --only "weights,activation" --torch-device cuda)
    local micro=(--batch 1024 --max-rows 2560 --rounds 3)
    local base=(--model vit_base_patch16_224 --batch 64 --max-rows 256 --rounds 2)
    if [[ ${sets[*]} == flex ]]; then
        rates=(--rates-only --only weights)
        micro=(--batch 2 --queries 2 --rounds 1)
        base=("${micro[@]}")
    fi
    export -f cargo_of
    for set in "${sets[@]}"; do
        dtype=float32
        [[ $set == *bf16* ]] && dtype=bfloat16
        name=${set/,/-}
        step "$name-main-job" 90 bash -c 'cargo_of "$@"' - "$set" run --release -p flops-examples --example vit_cifar \
            --features "$set" -- --artifact-dir "$out/$name-main-job"
        step "$name-gradients" 40 bash -c 'cargo_of "$@"' - "$set" test --release -p flops-benches --lib --features "$set" \
            -- --nocapture
        if has_launches "$set"; then
            step "$name-launches" 120 bash -c 'cargo_of "$@"' - "$set" run --release -p flops-benches --bin launches \
                --features "$set" -- --artifact-dir "$out/$name-launches"
            continue
        fi
        step "$name-micro" 40 bash -c 'cargo_of "$@"' - "$set" run --release -p flops-benches --bin table --features "$set" \
            -- "${rates[@]}" --torch-dtype "$dtype" "${micro[@]}" --artifact-dir "$out/$name-micro"
        step "$name-base" 40 bash -c 'cargo_of "$@"' - "$set" run --release -p flops-benches --bin table --features "$set" \
            -- "${rates[@]}" --torch-dtype "$dtype" "${base[@]}" --artifact-dir "$out/$name-base"
    done
    echo "$out holds the logs and tables"
    return "$failed"
}

case $job in
build) build ;;
run) run ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
