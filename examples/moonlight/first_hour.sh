#!/usr/bin/env bash
# The first hour with Moonlight: look, prove, shard, train, export, talk to it.
#
#   examples/moonlight/first_hour.sh                  8 GPUs, Moonlight-16B-A3B, your chats.jsonl
#   MODEL=./tiny EP=2 examples/moonlight/first_hour.sh    any model of the same layout
#
# Everything is one epctl command a step; stop after any of them and go on later.
set -euo pipefail

MODEL=${MODEL:-moonshotai/Moonlight-16B-A3B}
DATA=${DATA:-chats.jsonl}          # one {"messages": [{"role": ..., "content": ...}, ...]} a line
GPUS=${GPUS:-8}                    # what step 2 plans for; the run takes what it finds
GPU_MEMORY=${GPU_MEMORY:-80GiB}
EP=${EP:-8}                        # expert parallel size: GPUs that share the experts
ZERO=${ZERO:-3}                    # EP and ZERO: step 2 says which are fastest
STEPS=${STEPS:-200}
LENGTH=${LENGTH:-4096}             # tokens a sequence
CHECK_LAYERS=${CHECK_LAYERS:-3}    # depth of the proof; three layers of Moonlight fit one GPU
RUN=${RUN:-runs/moonlight-first-hour}
EPCTL=${EPCTL:-epctl}
PYTHON=${PYTHON:-python}
# Moonlight's own tokenizer is Python code. Either trust a commit that you have read
# (`--trust-remote-code` with MODEL=org/name@COMMIT), or name a tokenizer in plain files.
read -r -a EXTRA <<< "${EXTRA:-}"

WHAT=("$MODEL" --data "$DATA" --ep "$EP" --zero "$ZERO" --set "train.sequence_length=$LENGTH")
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

echo "== 1. What is it? Read from headers, nothing is downloaded." >&2
$EPCTL inspect "$MODEL"

echo "== 2. What fits and what is fastest? Then: what would run, and what will it hold?" >&2
$EPCTL plan "$MODEL" --gpus "$GPUS" --gpu-memory "$GPU_MEMORY" --seq "$LENGTH"
$EPCTL train "${WHAT[@]}" "${EXTRA[@]}" --steps "$STEPS" --dry-run

echo "== 3. Does this layout train as the whole model does? Exit 7 if not." >&2
$EPCTL train "${WHAT[@]}" "${EXTRA[@]}" --check --check-layers "$CHECK_LAYERS" -o "$RUN-check"

if [[ -d "$MODEL" ]]; then
  echo "== 4. One folder a rank: each node reads, or is copied, its own experts only." >&2
  $EPCTL convert shard "$MODEL" --ep "$EP" -o "$RUN-shards"
  WHAT[0]="$RUN-shards"
else
  echo "== 4. Not sharded: MODEL is no folder; ranks will read their slices of the download." >&2
fi

echo "== 5. Train, with checkpoints to resume from." >&2
$EPCTL train "${WHAT[@]}" "${EXTRA[@]}" --steps "$STEPS" -o "$RUN" \
  --set checkpoint.every=$((STEPS / 2))

echo "== 6. Export: one Hugging Face folder, in the dtype of your choice." >&2
$EPCTL export "$RUN" -o "$RUN-exported" --dtype bf16

echo "== 7. Talk to it: the exported folder is a plain Hugging Face model." >&2
"$PYTHON" "$HERE/sample.py" "$RUN-exported" "What is 2 plus 2?"
