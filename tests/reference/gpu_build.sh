#!/bin/sh
# Builds what gpu_check.py takes to a GPU machine, into gpu-kit/: the trainer with CUDA, its tests, and the script. Needs no CUDA and no GPU.
set -eu
cd "$(dirname "$0")/../.."
mkdir -p gpu-kit
cargo build --release --locked -p trainer --features cuda
cp target/release/trainer gpu-kit/trainer
tests=$(cargo test --release --locked -p trainer --features cuda --lib --no-run --message-format=json |
    python3 -c 'import json, sys
lines = [json.loads(line) for line in sys.stdin]
print([line["executable"] for line in lines if line.get("executable") and line["target"]["name"] == "trainer"][-1])')
cp "$tests" gpu-kit/trainer-tests
strip gpu-kit/trainer gpu-kit/trainer-tests
cp tests/reference/gpu_check.py gpu-kit/
ls -l gpu-kit
