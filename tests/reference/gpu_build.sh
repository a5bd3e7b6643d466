#!/bin/sh
# Builds what gpu_check.py takes to a GPU machine, into gpu-kit/ and as one file gpu-kit.tar.gz: the trainer with CUDA, its tests, the names of our kernels, and the script. Needs no CUDA and no GPU.
# --emulator: also the emulated libraries, for a rehearsal of the script.
set -eu
cd "$(dirname "$0")/../.."
mkdir -p gpu-kit
cargo build --release --locked -p trainer --features cuda
cp "${CARGO_TARGET_DIR:-target}/release/trainer" gpu-kit/trainer
tests=$(cargo test --release --locked -p trainer --features cuda --lib --no-run --message-format=json |
    python3 -c 'import json, sys
lines = [json.loads(line) for line in sys.stdin]
print([line["executable"] for line in lines if line.get("executable") and line["target"]["name"] == "trainer"][-1])')
cp "$tests" gpu-kit/trainer-tests
strip gpu-kit/trainer gpu-kit/trainer-tests
sed -n 's/^\.visible \.entry \([a-z0-9_]*\).*/\1/p' trainer/src/gpu/kernels.ptx > gpu-kit/kernels.txt
cp tests/reference/gpu_check.py gpu-kit/
tar czf gpu-kit.tar.gz --exclude gpu-kit/emulator gpu-kit
if [ "${1:-}" = --emulator ]; then
    mkdir -p gpu-kit/emulator
    for library in libcuda.so=cuda libcublas.so=libraries libcudnn.so=libraries libnccl.so.2=libraries; do
        name=${library%=*}
        # The others put their work on its streams.
        needed=$([ "$name" = libcuda.so ] || echo gpu-kit/emulator/libcuda.so)
        ${CXX:-g++} -std=c++17 -O2 -fPIC -shared -I trainer/tests/emulator "-Wl,-soname,$name" -o "gpu-kit/emulator/$name" "trainer/tests/emulator/${library#*=}.cpp" $needed
    done
fi
ls -l gpu-kit gpu-kit.tar.gz
