"""Compares one rank of two threads with two ranks of one thread, over every transport, on this machine.

    python3 tests/bench/ranks.py MODEL --rounds 8

Three clusters of the built programs (`make build`) run at a time and are asked in turn, by one client: prompts of 512
tokens and one new one (prefill), prompts of 16 and 64 new ones (decode). Each round's rates are divided by those of the
one rank in the same round; medians count, for cores are disturbed at any time.

A model whose KV heads two ranks share evenly: `lockstep make-model --shape llama-3.2-1b --encoding q4_0 MODEL`.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path

from compare import ROOT, Server, run

CLUSTERS = {
    "1 rank of 2 threads": ["--world-size", 1, "--threads", 2],
    "2 ranks over shm": ["--world-size", 2, "--threads", 1, "--transport", "shm"],
    "2 ranks over tcp": ["--world-size", 2, "--threads", 1, "--transport", "tcp"],
}
# Tokens of prompts, new tokens of each, and prompts a round.
WORK = {"prefill": (512, 1, 2), "decode": (16, 64, 2)}
FIRST_PORT = 50975


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of Lockstep's programs")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    # What is guessed would differ from prompt to prompt, not from cluster to cluster, but hide what a step takes.
    os.environ["LOCKSTEP_WORKER__ENGINE__SPECULATION"] = "off"
    rates = {work: {name: [] for name in CLUSTERS} for work in WORK}
    with contextlib.ExitStack() as running:
        targets = {}
        for port, (name, arguments) in enumerate(CLUSTERS.items(), FIRST_PORT):
            targets[name] = f"127.0.0.1:{port}"
            up = [options.bin / "lockstep", "up", options.model, "--gateway-listen", targets[name], *arguments]
            up += ["--http-listen", "127.0.0.1:0"]
            running.enter_context(Server(up)).wait_for_line("Lockstep serves")
        for round_idx in range(options.rounds + 1):
            for work in WORK:
                for name, target in targets.items():
                    rate = measure(options.bin / "lockstep", target, round_idx, *WORK[work])
                    # The first round warms up.
                    if round_idx > 0:
                        rates[work][name].append(rate)
    print_table(rates)


def measure(lockstep, target, seed, n_prompt, n_new, n_requests):
    """Tokens a second: of the prompts, or of what is generated."""
    load = ["--concurrency", 1, "--requests", n_requests, "--seed", seed]
    lengths = ["--prompt-tokens", n_prompt, "--max-new-tokens", n_new]
    report = json.loads(run([lockstep, "bench", "serve", "--target", target, "--json", *load, *lengths]))
    if report["succeeded"] != n_requests:
        sys.exit(f"lockstep bench serve: {report['errors']}")
    return n_prompt / report["ttft_ms"]["p50"] * 1e3 if n_new == 1 else report["output_tokens_per_s"]


def print_table(rates):
    print("| what | ranks | tok/s, median | ratio, median (quartiles) | by round |\n|---|---|---|---|---|")
    for work, by_cluster in rates.items():
        alone = next(iter(by_cluster.values()))
        for name, rounds in by_cluster.items():
            ratios = [rate / one for rate, one in zip(rounds, alone)]
            by_round = " ".join(f"{ratio:.2f}" for ratio in ratios)
            low, median, high = statistics.quantiles(ratios, n=4)
            rate = f"{statistics.median(rounds):.1f} | {median:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {work} | {name} | {rate} | {by_round} |")


if __name__ == "__main__":
    main()
