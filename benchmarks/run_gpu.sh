#!/usr/bin/env bash
# The benchmark runs behind the notes in this folder, one name a call, each under ten minutes:
#     benchmarks/run_gpu.sh NAME [FOLDER]        # results go to FOLDER (default: .)
# On a machine without an installation: PYTHONPATH=$PWD TORCH_CUDA_ARCH_LIST=9.0 (CONTRIBUTING.md), wheels by wheels.sh.
#
#   one GPU    kernels       tests marked gpu (2 min on 10 cores)
#              moe           one block of Moonlight and Qwen3-30B beside its peers (4 min)
#              muon          experts beside peers, products by tile (2 min)
#              muon-ep8      all that a rank of EP=8 owns, and the whole step (2 min)
#              sanitizer     compute-sanitizer over the block's kernels
#   two GPUs   train-z3, train-z2   Muon and AdamW beside DeepSpeed, whose first Muon step compiles (4 min each)
#              train-27      the whole Moonlight, epctl alone (2 min)
#              train-gate    twenty steps in bfloat16 beside the whole model, ZeRO-2 and 3, Muon and AdamW (4 min)
#              scaling       one GPU and both, epctl alone (5 min)
#              sp            one vision-language sample over both (4 min)
set -euo pipefail
name=${1:?which run}
folder=${2:-.}
mkdir -p "$folder"
export COLUMNS=${COLUMNS:-150}
bench() { python3 -m epctl bench "$@" --json-file "$folder/$name.json" --png "$folder/$name.png"; }
moonlight=moonshotai/Moonlight-16B-A3B

case $name in
  kernels) python3 -m pytest -q -n 10 -p no:cacheprovider tests/kernels tests/unit/test_sequence_attend.py ;;
  moe) bench moe --shape moonlight --tokens 512 --tokens 2048 --tokens 16384 \
    --routing natural --routing zipf --peer deepspeed-fused --peer liger --rounds 11
    name=moe-peers; bench moe --shape moonlight --tokens 512 --tokens 16384 --peer moe-ops --peer sonicmoe --rounds 9
    name=moe-qwen3; bench moe --shape qwen3-30b --tokens 32768 --peer deepspeed-fused --rounds 9 ;;
  muon) bench muon --products --peer deepspeed-standard --peer deepspeed-gram --peer gram-newton-schulz --rounds 11 ;;
  muon-ep8) bench muon --model $moonlight --ep 8 --peer none --step --rounds 5 ;;
  sanitizer) compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m pytest -q -x -p no:cacheprovider \
    tests/kernels/test_triton.py::test_moe_half_routing ;;
  train-z3) bench train --zero 3 --optim adamw,muon --peer deepspeed --rounds 1 --steps 4 --no-profile ;;
  train-z2) bench train --zero 2 --optim adamw,muon --peer deepspeed --rounds 1 --steps 4 --no-profile ;;
  train-27) bench train --model $moonlight --zero 3 --optim muon --micro-batch 6 --peer none --rounds 1 --steps 5 ;;
  train-gate) bench train --gate-steps 20 --peer none --rounds 1 --steps 1 --routing natural --no-profile ;;
  scaling) bench train --zero 3 --scaling --peer none --rounds 1 --steps 5 --no-profile ;;
  sp) bench multimodal-sp --rounds 3 ;;
  *) echo "unknown run: $name" >&2; exit 2 ;;
esac
