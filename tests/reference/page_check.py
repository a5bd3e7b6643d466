#!/usr/bin/env python3
"""The page in headless Chromium: a node of its own, a synthetic study, every page loaded with and without scripts.

Needs chromium and the built program: tests/reference/page_check.py target/debug/edge [--shots DIR]
Exit 0 when every page loads without a console message (a violated content security policy is one), the script comes alive, the picture is drawn,
and the page says the same without scripts.
"""

import argparse
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request


LIVE = 'id="live-text">Live<'
# The page is dumped as soon as it is loaded, on a busy machine before the first event.
TRIES = 20


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def chromium(*arguments):
    fixed = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--enable-logging=stderr", "--timeout=6000"]
    return subprocess.run([*fixed, *arguments], capture_output=True, text=True, timeout=120)


def check(what, is_so, found=""):
    print(("ok   " if is_so else "FAIL ") + what)
    if not is_so:
        print(found)
    return is_so


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("edge")
    parser.add_argument("--shots")
    arguments = parser.parse_args()
    edge = str(pathlib.Path(arguments.edge).resolve())
    with tempfile.TemporaryDirectory() as folder:
        page = f"127.0.0.1:{free_port()}"
        config = pathlib.Path(folder, "edge.toml")
        config.write_text(
            f'dicom_bind = "127.0.0.1"\ndicom_port = {free_port()}\nhttp_bind = "{page}"\nstate_dir = "state"\nquiet_time_s = 1\n'
            "[retention]\nkeep_free_mib = 1\n"
        )
        node = subprocess.Popen([edge, "serve", "--config", config], stderr=subprocess.DEVNULL)
        try:
            return examine(edge, config, page, arguments.shots)
        finally:
            node.terminate()
            node.wait(30)


def examine(edge, config, page, shots):
    for _ in range(100):
        if subprocess.run([edge, "status", "--config", config], capture_output=True).returncode == 0:
            break
        time.sleep(0.2)
    demo = subprocess.run([edge, "demo", "--slices", "60", "--config", config], capture_output=True, text=True, check=True)
    study = demo.stdout.splitlines()[-1]
    for _ in range(100):
        if b'"complete"' in urllib.request.urlopen(f"http://{page}/api/studies").read():
            break
        time.sleep(0.2)
    well = True
    for name, address in [("worklist", f"http://{page}/"), ("study", f"{study}?heatmap=1"), ("system", f"http://{page}/system")]:
        for _ in range(TRIES):
            loaded = chromium("--dump-dom", address)
            if LIVE in loaded.stdout:
                break
        console = [line for line in loaded.stderr.splitlines() if "CONSOLE" in line]
        well &= check(f"{name}: no console message", not console, "\n".join(console))
        well &= check(f"{name}: live", LIVE in loaded.stdout, loaded.stdout[-2000:])
        well &= check(f"{name}: times are the reader's", not re.search(r"<time[^>]*>[^<]* UTC<", loaded.stdout))
        plain = urllib.request.urlopen(address).read().decode()
        words = lambda html: sorted(set(re.findall(r'class="badge[^"]*">([^<]*)', html)))
        well &= check(f"{name}: the same without scripts", words(plain) == words(loaded.stdout), f"{words(plain)} {words(loaded.stdout)}")
        if name == "study":
            well &= check("study: the picture is drawn", 'id="no-picture" hidden' in loaded.stdout, "")
        if shots:
            pathlib.Path(shots).mkdir(parents=True, exist_ok=True)
            for width in (1280, 500):
                shot = pathlib.Path(shots, f"{name}-{width}.png").resolve()
                chromium(f"--screenshot={shot}", f"--window-size={width},1100", address)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
