#!/bin/bash
# Puts into a folder what `check.sh` runs on a machine with a GPU, which needs no toolchain: programs and tests, stripped.
#
#     tests/gpu/pack.sh [FOLDER]        default: target/gpu
set -eu -o pipefail
cd "$(dirname "$0")/../.."
folder=${1:-target/gpu}
cargo build --release --locked --workspace --bins
tests=$(cargo test --release --locked --workspace --test gpu --test choice --test cuda --no-run --message-format=json |
  python3 -c 'import json, sys
names = {"worker/kernels/tests/gpu/main.rs": "kernels", "worker/tests/choice.rs": "choices", "tests/tests/cuda.rs": "models"}
for line in sys.stdin:
    built = json.loads(line)
    if built.get("executable"):
        for source, name in names.items():
            if built["target"]["src_path"].endswith("/" + source):
                print(name, built["executable"])')
# As in target/release, since the tests look for the programs one folder up.
rm -rf "$folder"
mkdir -p "$folder/deps"
for program in lockstep-worker lockstep-gateway lockstep-tokenizer-svc; do
  strip -o "$folder/$program" "target/release/$program"
done
while read -r name executable; do
  strip -o "$folder/deps/$name" "$executable"
done <<<"$tests"
du -shc "$folder"/lockstep* "$folder"/deps/*
