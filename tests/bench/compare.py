"""Compares Lockstep with llama.cpp on this machine, on the same files, and prints one table of ratios.

    python3 tests/bench/compare.py --llama-bin DIR --with-8b DIR --only decode,prefill

Needs built programs (`make build`), the demo model (`make fetch`), and llama.cpp's llama-bench, llama-batched-bench and
llama-server, from PATH or --llama-bin; without them Lockstep is measured alone. The two programs take turns, --rounds
times, and medians count. A ratio above 1 means that Lockstep is ahead, for rates and latencies alike. `of limit` is the
part of the memory bandwidth, measured in the same run, that reading the weights once a step comes to.

Nothing but Python's standard library is used. Every process that is started is ended, also after Ctrl-C.
"""

import argparse
import http.client
import json
import os
import random
import re
import signal
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ["decode", "prefill", "batch", "serve", "busy", "load"]
ENCODINGS_8B = ["q4_0", "q4_k_m"]
# A run that takes longer than this hangs. Unit: seconds.
RUN_TIMEOUT = 1800
READY_TIMEOUT = 300
LOCKSTEP_PORT, LLAMA_PORT = 50973, 50974
# What a rank may take beyond the file and the KV cache, and how long it may load.
LOAD_GOAL_S, MEMORY_GOAL_MIB = 2.0, 300


def main():
    options = parse_arguments()
    # Ended by a signal, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    lockstep, llama = Lockstep(options), Llama(options)
    models = [("SmolLM2", options.smollm)] if not options.without_smollm else []
    if options.with_8b:
        models += [(f"8B {encoding}", make_8b(lockstep, options.with_8b, encoding)) for encoding in ENCODINGS_8B]
    for _, path in models:
        warm_page_cache(path)
    bandwidth = lockstep.bandwidth()
    print_machine(bandwidth)
    table = Table(max(bandwidth.values()))
    rows = [row for name, path in models for row in rows_of(name, path, lockstep, llama, options)]
    for row in (row for row in rows if row["group"] in options.only):
        measured = {"lockstep": [], "llama": []}
        for _ in range(options.rounds):
            measured["lockstep"].append(row["lockstep"]())
            if llama.has(row["needs"]):
                measured["llama"].append(row["llama"]())
        table.add(row, {side: medians(runs) for side, runs in measured.items()})
    table.print()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of Lockstep's programs")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's programs; default: PATH")
    parser.add_argument("--smollm", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--with-8b", type=Path, metavar="DIR", help="also Llama-3-8B, made in DIR if it is not there")
    parser.add_argument("--without-smollm", action="store_true", help="only the models of --with-8b")
    parser.add_argument("--only", type=parse_groups, default=GROUPS, metavar="GROUPS", help=",".join(GROUPS))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one round, fewer tokens: a look, not a measurement")
    options = parser.parse_args()
    if options.short:
        options.rounds = 1
    return options


def parse_groups(text):
    groups = text.split(",")
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(GROUPS)}")
    return groups


def rows_of(name, path, lockstep, llama, options):
    """What is measured of one model: dictionaries with a `group`, a `name`, what each side does, and what it needs."""
    is_large = name.startswith("8B")
    rows = []

    def row(group, title, needs, ours, theirs, **extra):
        rows.append({
            "group": group, "name": f"{title}, {name}", "needs": needs,
            "lockstep": ours, "llama": theirs, "path": path, **extra,
        })

    n_tokens = (16 if is_large else 64) if options.short else (32 if is_large else 128)
    held = lockstep.held_bytes(path)
    for context in [16] if is_large else [16, 512]:
        row("decode", f"decode after {context}", "llama-bench",
            lambda context=context: lockstep.decode(path, context, n_tokens, 1),
            lambda context=context: llama.decode(path, context, n_tokens), bytes_per_token=held)
    n_prompt = 128 if is_large and options.short else 512
    row("prefill", f"prefill of {n_prompt}", "llama-bench",
        lambda: lockstep.prefill(path, n_prompt), lambda: llama.prefill(path, n_prompt))
    context = 256 if is_large else 128
    if options.short and is_large:
        context = 16
    for batch in [8, 32]:
        row("batch", f"decode of {batch} after {context}", "llama-batched-bench",
            lambda batch=batch: lockstep.decode(path, context, n_tokens // 2, batch),
            lambda batch=batch: llama.decode_batch(path, context, n_tokens // 2, batch),
            bytes_per_token=held / batch)
    row("load", "load, with a prompt of 16", "llama-bench",
        lambda: lockstep.load(path), lambda: llama.load(path))
    if not is_large:
        for group, title in [("serve", "served, 32 clients"), ("busy", "served, 32 clients, busy neighbour")]:
            def beside(serve, busy=group == "busy"):
                with Neighbour(busy):
                    return serve(path, 32, 32 if options.short else 96, 200, 64)
            row(group, title, "llama-server",
                lambda beside=beside: beside(lockstep.serve), lambda beside=beside: beside(llama.serve))
    return rows


# === The two programs ===


class Lockstep:
    def __init__(self, options):
        self.bin, self.threads = options.bin, options.threads
        self.worker = self.bin / "lockstep-worker"
        if not self.worker.is_file():
            sys.exit(f"{self.worker} is not there: `make build` builds it")

    def bandwidth(self):
        """Bytes a second by number of threads, the best over the numbers of streams."""
        readings = json.loads(run([self.worker, "bench", "memory", "--threads", self.threads, "--json"]))
        best = {}
        for reading in readings:
            threads = reading["threads"]
            best[threads] = max(best.get(threads, 0), reading["bytes_per_s"])
        return best

    def held_bytes(self, path):
        """Bytes of weights that a step reads."""
        return float(re.search(r"weights +([\d.]+) MiB", run([self.worker, "inspect", path]))[1]) * 2**20

    def engine(self, path, prompt, generate, batch):
        command = [self.worker, "bench", "engine", path, "--prompt", prompt, "--generate", generate, "--batch", batch]
        return json.loads(run([*command, "--threads", self.threads, "--repeat", 1, "--json"]))

    def decode(self, path, context, n_tokens, batch):
        return {"tok/s": self.engine(path, context, n_tokens + 1, batch)["decode_tokens_per_s"]}

    def prefill(self, path, n_prompt):
        return {"tok/s": self.engine(path, n_prompt, 2, 1)["prefill_tokens_per_s"]}

    def load(self, path):
        report = self.engine(path, 8, 2, 1)
        return {"s": report["load_s"], "peak MiB": report["peak_memory_mib"]}

    def serve(self, path, clients, n_requests, n_prompt, n_tokens):
        target = f"127.0.0.1:{LOCKSTEP_PORT}"
        up = [self.bin / "lockstep", "up", path, "--gateway-listen", target, "--threads", self.threads]
        up += ["--http-listen", "127.0.0.1:0"]
        with Server(up) as server:
            server.wait_for_line("Lockstep serves")
            load = ["--concurrency", clients, "--requests", n_requests]
            lengths = ["--prompt-tokens", n_prompt, "--max-new-tokens", n_tokens]
            command = [self.bin / "lockstep", "bench", "serve", "--target", target, "--json", *load, *lengths]
            report = json.loads(run(command))
        if report["succeeded"] != n_requests:
            sys.exit(f"lockstep bench serve: {report['errors']}")
        ttft, itl = report["ttft_ms"], report["itl_ms"]
        return serve_report(report["output_tokens_per_s"], ttft["p50"], ttft["p99"], itl["p50"], itl["p99"])


class Llama:
    def __init__(self, options):
        self.folder, self.threads = options.llama_bin, options.threads

    def program(self, name):
        return shutil.which(name, path=self.folder and str(self.folder))

    def has(self, name):
        return self.program(name) is not None

    def bench(self, path, *arguments):
        command = [self.program("llama-bench"), "-m", path, "-t", self.threads, "-r", 1, "-o", "json", *arguments]
        return {"tok/s": json.loads(run(command))[0]["avg_ts"]}

    def decode(self, path, context, n_tokens):
        return self.bench(path, "-p", 0, "-n", n_tokens, "-d", context)

    def prefill(self, path, n_prompt):
        return self.bench(path, "-p", n_prompt, "-n", 0)

    def decode_batch(self, path, context, n_tokens, batch):
        # The cache is divided among the sequences, in portions of 256.
        n_cache = batch * -(-(context + n_tokens) // 256) * 256
        lengths = ["-npp", context, "-ntg", n_tokens, "-npl", batch, "-c", n_cache]
        command = [self.program("llama-batched-bench"), "-m", path, "-t", self.threads, *lengths]
        lines = run([*command, "--output-format", "jsonl"]).splitlines()
        return {"tok/s": json.loads(next(line for line in lines if line.startswith("{")))["speed_tg"]}

    def load(self, path):
        command = [self.program("llama-bench"), "-m", path, "-t", self.threads, "-r", 1, "--no-warmup"]
        start = time.monotonic()
        process = subprocess.Popen(words([*command, "-p", 16, "-n", 0]), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"llama-bench ended with {process.returncode}")
        return {"s": time.monotonic() - start, "peak MiB": usage.ru_maxrss / 1024}

    def serve(self, path, clients, n_requests, n_prompt, n_tokens):
        n_cache = clients * -(-(n_prompt + n_tokens) // 256) * 256
        command = [self.program("llama-server"), "-m", path, "-t", self.threads, "-c", n_cache, "-np", clients,
                   "--port", LLAMA_PORT, "--no-cache-prompt"]
        with Server(command) as server:
            server.wait_for(lambda: http_status(LLAMA_PORT, "/health") == 200)
            return load_openai(LLAMA_PORT, clients, n_requests, n_prompt, n_tokens)


# === A client of the OpenAI HTTP API ===


def load_openai(port, clients, n_requests, n_prompt, n_tokens):
    """Each of `clients` sends its next request as soon as one ends, as `lockstep bench serve` does."""
    indices, lock = iter(range(n_requests)), threading.Lock()
    ttfts, gaps, counts, failures = [], [], [], []

    def client():
        while True:
            with lock:
                index = next(indices, None)
            if index is None or failures:
                return
            try:
                first, between, count = stream_openai(port, index, n_prompt, n_tokens)
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures.append(error)
                return
            with lock:
                ttfts.append(first)
                gaps.extend(between)
                counts.append(count)

    start = time.monotonic()
    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - start
    if failures:
        sys.exit(f"llama-server: {failures[0]}")
    return serve_report(sum(counts) / wall, percentile(ttfts, 50) * 1e3, percentile(ttfts, 99) * 1e3,
                        percentile(gaps, 50) * 1e3, percentile(gaps, 99) * 1e3)


def stream_openai(port, index, n_prompt, n_tokens):
    """Seconds to the first chunk, seconds between chunks, and tokens, of one request."""
    ids = random.Random(index).choices(range(6000, 43000), k=n_prompt)
    body = {"prompt": ids, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=RUN_TIMEOUT)
    start = last = time.monotonic()
    first, gaps, end = None, [], None
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {response.read(200)}")
    # Only the last chunk is parsed, so that the client leaves the processor to the server.
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        now = time.monotonic()
        end = line
        # The stream ends with a chunk that says why and one that counts; they bring no token.
        if b'"finish_reason":"length"' in line or b'"usage"' in line:
            continue
        if first is None:
            first = now - start
        else:
            gaps.append(now - last)
        last = now
    connection.close()
    count = json.loads(end[len(b"data: "):]).get("usage", {}).get("completion_tokens") if end else None
    if first is None or count != n_tokens:
        raise ValueError(f"{count} tokens instead of {n_tokens}; the stream ended with {end}")
    return first, gaps, count


def serve_report(rate, ttft_p50, ttft_p99, itl_p50, itl_p99):
    return {"tok/s": rate, "TTFT p50 ms": ttft_p50, "TTFT p99 ms": ttft_p99, "ITL p50 ms": itl_p50,
            "ITL p99 ms": itl_p99}


def percentile(values, percent):
    """By nearest rank, as `lockstep bench serve` has it."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


# === Processes ===


class Server:
    """A process that serves until the block ends."""

    def __init__(self, command):
        self.command = words(command)
        self.lines = []

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # What it says must be read, or it would wait for that.
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_for_line(self, text):
        self.wait_for(lambda: any(text in line for line in self.lines))

    def wait_for(self, condition):
        deadline = time.monotonic() + READY_TIMEOUT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.command[0]} does not serve: {''.join(self.lines[-3:])}")
            time.sleep(0.05)


class Neighbour:
    """A process that keeps the last core busy until the block ends."""

    SPIN = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"

    def __init__(self, is_there):
        self.is_there = is_there

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, "-c", self.SPIN]) if self.is_there else None

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()


def words(command):
    return [str(word) for word in command]


def run(command):
    """The output of a program that must succeed."""
    result = subprocess.run(words(command), capture_output=True, text=True, timeout=RUN_TIMEOUT, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(words(command))} ended with {result.returncode}: {result.stderr[-500:]}")
    return result.stdout


def http_status(port, path):
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None


def make_8b(lockstep, folder, encoding):
    path = folder / f"llama-3-8b.{encoding}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run([lockstep.worker, "make-model", "--shape", "llama-3-8b", "--encoding", encoding, path])
    return path


def warm_page_cache(path):
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


# === The table ===


class Table:
    def __init__(self, bandwidth):
        self.bandwidth = bandwidth
        self.rows = []

    def add(self, row, sides):
        """Takes in the medians of one row, a line for each figure."""
        for figure, ours in sides["lockstep"].items():
            theirs = sides["llama"].get(figure)
            ratio = theirs and (ours / theirs if figure == "tok/s" else theirs / ours)
            note = ""
            if "bytes_per_token" in row:
                note = f"{ours * row['bytes_per_token'] / self.bandwidth:.0%} of limit"
                if theirs:
                    note += f" (llama.cpp {theirs * row['bytes_per_token'] / self.bandwidth:.0%})"
            elif figure == "s":
                note = f"goal {LOAD_GOAL_S:.1f} s: {'met' if ours <= LOAD_GOAL_S else 'missed'}"
            elif figure == "peak MiB":
                goal = row["path"].stat().st_size / 2**20 + MEMORY_GOAL_MIB
                note = f"goal {goal:.0f} MiB and KV: {'met' if ours <= goal else 'missed'}"
            cells = [f"{row['name']}: {figure}", number(ours), number(theirs), f"{ratio:.2f}" if ratio else "-", note]
            self.rows.append(cells)
            print("  ".join(cells), file=sys.stderr)

    def print(self):
        print("| what | Lockstep | llama.cpp | ratio | |\n|---|---|---|---|---|")
        for cells in self.rows:
            print(f"| {' | '.join(cells)} |")


def print_machine(bandwidth):
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    limits = ", ".join(f"{threads} threads {rate / 1e9:.1f} GB/s" for threads, rate in sorted(bandwidth.items()))
    print(f"{time.strftime('%Y-%m-%d')}, {model}, {os.cpu_count()} cores; memory is read at: {limits}\n", flush=True)


def medians(runs):
    return {figure: statistics.median(run[figure] for run in runs) for figure in (runs[0] if runs else {})}


def number(value):
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    main()
