#!/usr/bin/env bash
# Wheels that take offtrail's SGLang engine to a machine with one Hopper GPU and no network, as two folders below 45 MiB:
#
#   benchmarks/gpu/bundle.sh OUT      OUT/engine: sglang and its kernels, cut down for Hopper; OUT/rest: all else
#
# There (docs/gpu.md says what the machine must have; engine.flags leave out the kernels that were cut):
#
#   python3 -m pip install --no-index --no-deps --upgrade --target SITE engine/*.whl rest/*.whl
#   export PYTHONPATH=SITE:OFFTRAIL/src CUDA_HOME=/usr/local/cuda
#   python3 OFFTRAIL/benchmarks/gpu/sglang.py
#
# Built, installed and imported with Python 3.12 and torch 2.11.0+cu130 on a machine without a GPU; not yet run on one.
# $PYTHON (python3) needs pip and a package index; about 1 GB of room in OUT while it works.
set -euo pipefail

LIMIT_MIB=45
KERNELS=sglang-kernel==0.4.5

[ $# = 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
requirements=$here/../../requirements/sglang-gpu.txt
python=${PYTHON:-python3}
mkdir -p "$1"
out=$(cd "$1" && pwd)
rm -rf "$out/engine" "$out/rest"
mkdir "$out/engine" "$out/rest"
whole=$(mktemp -d -p "$out")
trap 'rm -rf "$whole"' EXIT

# pip takes a manylinux tag literally, so that every one that a wheel may carry is named.
tags=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 5 12 17 24 26 27 28 31 34 35; do tags+=(--platform "manylinux_2_${glibc}_x86_64"); done
fetch() {
    "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.12 "${tags[@]}" "$@"
}

fetch -d "$out/rest" -r "$requirements"
mv "$out"/rest/sglang-*.whl "$out/engine"
fetch -d "$whole" "$KERNELS"
"$python" "$here/hopper_wheel.py" "$whole"/sglang_kernel-*.whl "$out/engine"

for folder in engine rest; do
    size=$(du -sm "$out/$folder" | cut -f1)
    echo "$out/$folder: $size MiB, $(ls "$out/$folder" | wc -l) wheels"
    [ "$size" -lt $LIMIT_MIB ] || { echo "$0: $out/$folder is not below $LIMIT_MIB MiB" >&2; exit 1; }
done
