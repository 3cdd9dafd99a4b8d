"""Measures what a cluster costs beside its model: a stub answers with the prompt's tokens, as fast as they are read.

    python3 tests/bench/fronts.py models/SmolLM2-135M-Instruct.Q4_1.gguf

gRPC (`StreamGenerate`, by `lockstep bench serve`) and server-sent events (`/v1/completions`, by curl) in turn, so many
streams of so many tokens each; then single short answers after prompts of 200 tokens. A token's cost is the processor time
of the gateway, which sees all of them (a tokenizer service sees the prompts alone); wall-clock rates share this machine
with the stub and the clients. Medians of the rounds count.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import ROOT, Server, run

GRPC, HTTP = "127.0.0.1:50991", "127.0.0.1:50992"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of Lockstep's programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4000)
    options = parser.parse_args()
    os.environ["LOCKSTEP_WORKER__STUB"] = "true"
    up = [options.bin / "lockstep", "up", options.model, "--gateway-listen", GRPC, "--http-listen", HTTP]
    figures = {}
    with Server(up) as server:
        server.wait_for_line("Lockstep serves")
        gateway = child(server.process.pid, "lockstep-gateway")
        for round_idx in range(options.rounds + 1):
            for front, load in [("gRPC", grpc), ("SSE", sse)]:
                before = cpu_seconds(gateway)
                n_tokens, wall_s = load(options)
                spent = cpu_seconds(gateway) - before
                # The first round warms up.
                if round_idx > 0:
                    note(figures, f"{front}: tokens/s, wall", n_tokens / wall_s)
                    note(figures, f"{front}: tokens/s of a core of the gateway", n_tokens / spent)
            report = bench(options, concurrency=1, requests=200, tokens=1)
            if round_idx > 0:
                note(figures, "gRPC: time to first token after 200, p50 (us)", 1e3 * report["ttft_ms"]["p50"])
                note(figures, "gRPC: the same, p99 (us)", 1e3 * report["ttft_ms"]["p99"])
                note(figures, "gRPC: requests/s of one client", report["requests_per_s"])
    for name, values in figures.items():
        print(f"{name:<60} {statistics.median(values):>12,.0f}   ({min(values):,.0f} to {max(values):,.0f})")


def note(figures, name, value):
    figures.setdefault(name, []).append(value)


def child(parent, name):
    """The process of this program that the cluster has started."""
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", name], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench(options, concurrency, requests, tokens):
    load = ["--concurrency", concurrency, "--requests", requests, "--max-new-tokens", tokens, "--prompt-tokens", 200]
    return json.loads(run([options.bin / "lockstep", "bench", "serve", "--target", GRPC, "--json", *load]))


def grpc(options):
    report = bench(options, options.streams, options.streams, options.tokens)
    return report["output_tokens"], report["wall_s"]


def sse(options):
    """Streams read by curl, which does next to nothing with them."""
    body = {"prompt": list(range(1000, 1200)), "max_tokens": options.tokens, "stream": True, "ignore_eos": True}
    command = ["curl", "-sfN", f"http://{HTTP}/v1/completions", "-d", json.dumps(body)]
    with contextlib.ExitStack() as files:
        answers = [files.enter_context(tempfile.TemporaryFile()) for _ in range(options.streams)]
        begun = time.monotonic()
        clients = [subprocess.Popen(command, stdout=answer) for answer in answers]
        for client in clients:
            if client.wait() != 0:
                sys.exit("a stream failed")
        wall_s = time.monotonic() - begun
        return sum(n_tokens(answer) for answer in answers), wall_s


def n_tokens(answer):
    """Tokens of a whole answer: each has a piece of its own, and the end has two."""
    answer.seek(0)
    pieces = answer.read().split(b"\n\n")
    assert pieces[-2] == b"data: [DONE]", pieces[-2]
    return len(pieces) - 3


if __name__ == "__main__":
    main()
