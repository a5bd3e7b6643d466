"""What the inner loops of the aarch64 kernels should reach on a Cortex-A72 and a Neoverse N1, by llvm-mca.

Usage: arm_inner_loops.py BINARY

BINARY is any aarch64 program that links the engine, symbols included (the example `run` or `edge` of an aarch64 build); aarch64-linux-gnu-objdump
and llvm-mca must be installed. The loop is the one from the target of the last backward branch after a kernel's multiplications to that branch. A static
model: caches are perfect.
"""

import re
import subprocess
import sys

# Kernel: symbol, multiplication, multiply-accumulates of one, CPU, most multiply-accumulates a cycle of that CPU.
KERNELS = {
    "neon": ("kernels4neon", "sadalp", 16, "cortex-a72", 8),
    "neon-dot": ("8neon_dot", "sdot", 16, "neoverse-n1", 32),
}


def functions(binary, symbol):
    """Instructions `(address, text)` of each function whose mangled name holds `symbol`."""
    text = subprocess.run(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", binary], capture_output=True, text=True, check=True).stdout
    for part in text.split("\n\n"):
        head, *lines = part.strip().split("\n")
        if symbol in head:
            found = [re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in lines]
            yield [(int(m[1], 16), m[2].split("//")[0].split("<")[0].strip()) for m in found if m]


def loop(instructions, multiplication):
    """The instructions of the shortest loop that holds the most multiplications."""
    best = []
    for end, text in instructions:
        m = re.match(r"(?:b\.\w+|cbn?z\s+\w+,)\s+([0-9a-f]+)$", text)
        if m and int(m[1], 16) < end:
            body = [t for address, t in instructions if int(m[1], 16) <= address <= end]
            count = sum(t.startswith(multiplication) for t in body)
            if (count, -len(body)) > (sum(t.startswith(multiplication) for t in best), -len(best)):
                best = body
    return best


def cycles(body, cpu):
    # Branches become no-ops of the same cost: their targets are not in the snippet.
    lines = [re.sub(r"\s+[0-9a-f]+$", " .", line) if re.match(r"(b|cb)", line) else line for line in body]
    command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod", "-iterations=200"]
    out = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", out)[1]) / 200


def main():
    for kernel, (symbol, multiplication, macs, cpu, peak) in KERNELS.items():
        bodies = [loop(instructions, multiplication) for instructions in functions(sys.argv[1], symbol)]
        body = max(bodies, key=lambda body: sum(t.startswith(multiplication) for t in body))
        n = sum(t.startswith(multiplication) for t in body)
        took = cycles(body, cpu)
        rate = n * macs / took
        print(f"{kernel:9} {cpu:12} {len(body)} instructions, {n} x {macs} multiply-accumulates in {took:.1f} cycles: {rate:.1f} a cycle, "
              f"{100 * rate / peak:.0f} % of {peak}")


if __name__ == "__main__":
    main()
