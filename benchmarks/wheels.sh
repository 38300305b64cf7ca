#!/usr/bin/env bash
# Wheels for a GPU machine that can fetch nothing and has torch, Triton and Python 3.12, as the notes here had:
#     benchmarks/wheels.sh [FOLDER]      # default: .whl, 28 MB; needs .venv (make install), for DeepSpeed is built by it
# There, in the checkout:
#     python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site .whl/*.whl
#     export PYTHONPATH=/tmp/site:$PWD TORCH_CUDA_ARCH_LIST=9.0
#     benchmarks/run_gpu.sh NAME
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.whl}
python=$root/.venv/bin/python
version() { sed -n "s/^$1==//p" "$root/requirements/constraints.txt"; }
mkdir -p "$folder"
deepspeed=(hjson msgpack ninja pydantic==2.12.5 pydantic-core==2.41.5 annotated-types typing-inspection py-cpuinfo einops)
transformers=("transformers==$(version transformers)" "tokenizers==$(version tokenizers)" "safetensors==$(version safetensors)"
  "huggingface-hub==$(version huggingface-hub)" httpx2 httpcore2 truststore anyio idna hf-xet "click>=8.4.2,<9" h11)
$python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 --platform any \
  -d "$folder" "${deepspeed[@]}" "${transformers[@]}"
DS_BUILD_OPS=0 $python -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "deepspeed==$(version deepspeed)"
ls "$folder"
