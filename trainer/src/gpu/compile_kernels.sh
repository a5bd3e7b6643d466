#!/bin/sh
# Compiles kernels.cu to kernels.ptx, or with --check compares what is committed with what comes out, and prints registers and spills.
# Needs nvcc 13.0, from a toolkit or, on a machine without one, from PyPI:
#   pip download --no-deps nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
# unpacked into one folder; nvidia/cu13/bin goes into PATH. Later compilers write PTX that driver 580 refuses.
set -eu
cd "$(dirname "$0")"
nvcc --version | grep -q 'release 13.0' || { echo "nvcc 13.0 is needed" >&2; exit 69; }
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
nvcc -O3 -std=c++17 -Werror all-warnings -arch=compute_90 --ptx -o "$made/kernels.ptx" kernels.cu
ptxas --gpu-name sm_90 --warn-on-spills -Werror -v -o /dev/null "$made/kernels.ptx" 2>&1 |
    awk '/Compiling entry/ { name = $7 } /Used/ { print name, $0 }' | sed "s/'//g; s/ptxas info *: //"
if [ "${1:-}" = --check ]; then
    cmp "$made/kernels.ptx" kernels.ptx || { echo "kernels.ptx is not that of kernels.cu: run $0" >&2; exit 1; }
    echo "kernels.ptx is that of kernels.cu"
else
    cp "$made/kernels.ptx" kernels.ptx
fi
