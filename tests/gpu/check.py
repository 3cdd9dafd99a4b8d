"""Checks Lockstep on this machine's first GPU: right, then fast. Prints one table; with $OUT also $OUT/gpu.jsonl and a log.

    tests/gpu/check.sh [FOLDER] [--emulator]        FOLDER: from pack.sh; default: target/gpu

Each part has a time limit and all together have --budget; what fails does not stop what follows. Speed has goals for an
H200 only. --emulator is a rehearsal without a GPU: the same tests on the emulator of CUDA, a tiny model to "measure", and
no ceilings. Exit status: 1 if anything failed.

Nothing but Python's standard library is used; ceilings.py and yardstick.py need PyTorch and transformers, and are skipped
where these are missing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Tests that need what cannot come along: the demo model's file has 98 MB.
TESTS_LEFT_OUT = {"the_demo_model_says_what_it_says_on_the_cpu": "the demo model is not here"}
# Limits of a single test, of a measurement, and of the rest. Unit: seconds.
TEST_LIMIT, BENCH_LIMIT, TOOL_LIMIT, YARDSTICK_LIMIT = 100, 90, 60, 150
# Where files are in memory, and what the model for speed takes there.
MEMORY_FOLDER, MODEL_BYTES = Path("/dev/shm"), 5 << 30

# Of one H200, from the issue that asked for the GPU worker.
GOALS = {
    "decode, 1 sequence, context 1k": 600,
    "decode, 32 sequences, context 1k": 10_000,
    "decode, 256 sequences, context 512": 25_000,
    "prefill, prompt of 2k": 30_000,
    "prefill, prompt of 4k": 30_000,
    "prefill, prompt of 2k, without the lockstep rule": 30_000,
    "prefill, prompt of 4k, without the lockstep rule": 30_000,
    "file in memory to first token, kernels compiled": 5,
    "decode, 1 sequence: time in which the device is idle": 5,
}


@dataclass
class Line:
    """A line of the table."""
    part: str
    what: str
    verdict: str
    note: str = ""
    value: float | None = None
    unit: str = ""
    seconds: float = 0.0


class Check:
    """The run: its settings, its clock and its lines."""

    def __init__(self, options):
        self.folder = options.folder.resolve()
        self.emulator = options.emulator
        self.end = time.monotonic() + options.budget
        self.out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
        self.lines = []
        self.device = "an emulator" if self.emulator else "no GPU"
        self.cache = tempfile.mkdtemp(prefix="lockstep-check-")
        self.env = dict(os.environ, XDG_CACHE_HOME=self.cache)
        if self.emulator:
            self.env.pop("LOCKSTEP_TEST_GPU", None)
        else:
            self.env["LOCKSTEP_TEST_GPU"] = "0"

    def add(self, line):
        self.lines.append(line)
        print(f"{line.verdict}  {line.part}: {line.what}  {line.note}", flush=True)
        if self.out:
            with open(self.out / "gpu.jsonl", "a") as file:
                file.write(json.dumps(asdict(line)) + "\n")

    def run(self, command, limit, env=None):
        """What a command printed, and why it failed or None."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 1:
            return "", "no time is left"
        try:
            done = subprocess.run([str(part) for part in command], env=env or self.env, timeout=limit, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
            output, why = done.stdout, None if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as expired:
            output, why = (expired.stdout or b"").decode(errors="replace"), f"took more than {limit:.0f} s"
        except OSError as error:
            output, why = "", str(error)
        if self.out:
            with open(self.out / "gpu.log", "a") as file:
                file.write(f"$ {' '.join(map(str, command))}\n{output}{why or 'done'}\n\n")
        return output, why

    def worker(self, *arguments, limit=TOOL_LIMIT):
        return self.run([self.folder / "lockstep-worker", *arguments], limit)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "target/gpu")
    parser.add_argument("--emulator", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything; default: 570")
    check = Check(parser.parse_args())
    if not (check.folder / "lockstep-worker").is_file():
        sys.exit(f"{check.folder} has no lockstep-worker: make the folder with tests/gpu/pack.sh")
    # Tests of kernels make the emulator's libraries, which the programs are given after that.
    parts = [machine, kernel_tests, rehearsed_speed] if check.emulator else [machine, ceilings, kernel_tests, speed]
    for part in parts:
        part(check)
    return print_table(check)


# === The machine ===

def machine(check):
    """Which GPU and driver there are, and that the kernels compile for it."""
    if check.emulator:
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    output, why = check.run(query, TOOL_LIMIT)
    check.add(Line("machine", "GPU, driver, memory", "FAIL" if why else "PASS", why or output.strip()))
    check.device = output.split(",")[0].strip() if not why else check.device
    output, why = check.worker("doctor")
    lines = [line for line in output.splitlines() if line.startswith(("gpu ", "nvrtc", "cublaslt"))]
    found = "; ".join(line.split(maxsplit=1)[1] for line in lines)
    check.add(Line("machine", "what a worker finds", "FAIL" if why or "missing" in found else "PASS", why or found))
    capability = re.search(r"compute capability (\d)\.(\d)", output)
    if capability:
        # Instructions of 9.0 that its successors lack are in 9.0a.
        arch = "sm_" + "".join(capability.groups()) + ("a" if capability.group(1) == "9" else "")
        start = time.monotonic()
        output, why = check.worker("kernels", "--arch", arch, "--cache", Path(check.cache) / "lockstep/kernels",
                                   limit=2 * TOOL_LIMIT)
        # After a line for the compiler's version and one for the table's head.
        compiled = f"{len(output.splitlines()) - 2} kernels for {arch}, no spills in hot ones"
        note = f"{why}: {last_line(output)}" if why else compiled
        check.add(Line("machine", "kernels compile", "FAIL" if why else "PASS", note, seconds=time.monotonic() - start))


def ceilings(check):
    """What the GPU does at best."""
    found = python_tool(check, "ceilings", "ceilings.py", TOOL_LIMIT)
    for key, what, unit in [("copy_gb_per_s", "copy on the device, read and written", "GB/s"),
                            ("matmul_tflop_per_s", "bf16 product of 8192 x 8192 x 8192", "TFLOP/s")]:
        if found:
            check.add(Line("ceilings", what, "PASS", f"PyTorch {found['torch']}", found[key], unit))


def python_tool(check, part, script, limit):
    """The JSON object that a script beside this one prints; None if it does not."""
    start = time.monotonic()
    output, why = check.run([sys.executable, HERE / script], limit)
    if not why:
        return json.loads(last_line(output))
    missing = re.search(r"No module named '\w+'", output)
    verdict, note = ("SKIP", missing[0]) if missing else ("FAIL", f"{why}: {last_line(output)}")
    check.add(Line(part, script, verdict, note, seconds=time.monotonic() - start))
    return None


# === Right ===

def kernel_tests(check):
    """Every test of kernels, of choices and of whole models, each in a process of its own: a GPU that fails, fails a process."""
    for part in ["kernels", "choices", "models"]:
        path = check.folder / "deps" / part
        output, why = check.run([path, "--list"], TOOL_LIMIT)
        ignored, _ = check.run([path, "--list", "--ignored"], TOOL_LIMIT)
        names, ignored = (re.findall(r"^(.*): test$", text, re.MULTILINE) for text in (output, ignored))
        if why or not names:
            check.add(Line(part, str(path), "FAIL", why or "it lists no tests"))
        with ThreadPoolExecutor(2 if check.emulator else 4) as pool:
            for line in pool.map(lambda name: run_test(check, part, path, name, name in ignored), names):
                check.add(line)


def run_test(check, part, path, name, is_ignored):
    what = name.replace("::", ": ").replace("_", " ")
    if name in TESTS_LEFT_OUT and not check.emulator:
        return Line(part, what, "SKIP", TESTS_LEFT_OUT[name])
    if is_ignored and check.emulator:
        return Line(part, what, "SKIP", "runs on a real GPU only")
    start = time.monotonic()
    output, why = check.run([path, "--exact", name, "--include-ignored", "--nocapture"], TEST_LIMIT)
    seconds = time.monotonic() - start
    if why:
        panic = re.search(r"panicked at .*\n(.*)|^Error: (.*)", output, re.MULTILINE)
        reason = next(filter(None, panic.groups()), "") if panic else last_line(output)
        return Line(part, what, "FAIL", f"{why}: {reason}", seconds=seconds)
    if "a real GPU cannot" in output:
        return Line(part, what, "SKIP", "a real GPU cannot be told to fail; the emulator can")
    measured = re.findall(r".*\boff by .*", output)
    return Line(part, what, "PASS", measured[-1] if measured else "", seconds=seconds)


# === Fast ===

def speed(check):
    """The goals, on a model of random weights in the shape of Llama-3-8B."""
    has_room = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > MODEL_BYTES
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER if has_room else None) as folder:
        model = Path(folder) / "llama-3-8b.gguf"
        start = time.monotonic()
        output, why = check.worker("make-model", "--shape", "llama-3-8b", model, limit=2 * TOOL_LIMIT)
        check.add(Line("speed", "Llama-3-8B of random weights, Q4_0", "FAIL" if why else "PASS", why or "",
                       seconds=time.monotonic() - start))
        if why:
            return
        report = bench(check, "decode, 1 sequence, context 1k", model, "decode", 960, 128, repeat=3)
        idle(check, report)
        bench(check, "decode, 32 sequences, context 1k", model, "decode", 960, 128, batch=32)
        bench(check, "decode, 256 sequences, context 512", model, "decode", 448, 128, batch=256)
        bench(check, "prefill, prompt of 2k", model, "prefill", 2048, 2, repeat=5)
        bench(check, "prefill, prompt of 4k", model, "prefill", 4096, 2, repeat=5)
        for what, prompt in [("prefill, prompt of 2k", 2048), ("prefill, prompt of 4k", 4096)]:
            bench(check, f"{what}, without the lockstep rule", model, "prefill", prompt, 2, "--no-deterministic", repeat=5,
                  chunk=prompt)
        first_token(check, model)
    sums(check)
    found = python_tool(check, "speed", "yardstick.py", YARDSTICK_LIMIT)
    if found:
        note = f"transformers {found['transformers']}, static cache, compiled"
        check.add(Line("speed", "the same by transformers in bf16: decode, 1 sequence, context 1k", "PASS", note,
                       found["decode_tokens_per_s"], "tok/s"))


def rehearsed_speed(check):
    """That the measurements work, on a model that means nothing."""
    libraries = sorted((ROOT / "target/emulator").glob("*/libcuda.so.1"), key=lambda path: path.stat().st_mtime)
    if not libraries:
        return check.add(Line("speed", "rehearsal", "FAIL", "tests have left no target/emulator"))
    check.env["LD_LIBRARY_PATH"] = str(libraries[-1].parent)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny.gguf"
        check.worker("make-model", "--shape", "tiny", model)
        idle(check, bench(check, "decode, 2 sequences, rehearsed", model, "decode", 16, 4, batch=2))
        bench(check, "prefill, rehearsed", model, "prefill", 32, 2)
        first_token(check, model)
    sums(check, "--rows", "1,2", "--width", 64, "--sums", 2, "--repeat", 2)


def bench(check, what, model, phase, prompt, generate, *more, batch=1, repeat=1, chunk=2048):
    """One measurement; a goal is the least. Returns the report, if there is one."""
    start = time.monotonic()
    command = ["bench", "engine", model, "--device", "cuda", "--gpu", 0, "--prompt", prompt, "--generate", generate,
               "--batch", batch, "--chunk", chunk, "--repeat", repeat, "--json", *more]
    output, why = check.worker(*command, limit=BENCH_LIMIT)
    seconds = time.monotonic() - start
    if why:
        return check.add(Line("speed", what, "FAIL", f"{why}: {last_line(output)}", seconds=seconds))
    report = json.loads(last_line(output))
    value = report[phase + "_tokens_per_s"]
    verdict, note = judge(check, what, lambda goal: value >= goal, "at least")
    check.add(Line("speed", what, verdict, note, value, "tok/s", seconds))
    return report


def idle(check, report):
    """What the host costs a decode step: the device has nothing to do."""
    if report is None:
        return
    what, value = "decode, 1 sequence: time in which the device is idle", report["decode_idle_percent"]
    verdict, note = judge(check, what, lambda goal: value <= goal, "at most")
    check.add(Line("speed", what, verdict, note, value, "%"))


def first_token(check, model):
    """A whole process: from its start over loading and warming up to the end of a prompt and a token more."""
    what = "file in memory to first token, kernels compiled"
    start = time.monotonic()
    output, why = check.worker("bench", "engine", model, "--device", "cuda", "--gpu", 0, "--prompt", 16, "--generate", 2,
                               "--repeat", 1, "--json")
    seconds = time.monotonic() - start
    if why:
        return check.add(Line("speed", what, "FAIL", f"{why}: {last_line(output)}", seconds=seconds))
    verdict, note = judge(check, what, lambda goal: seconds <= goal, "at most")
    check.add(Line("speed", what, verdict, note, seconds, "s", seconds))


def sums(check, *sizes):
    """What the lockstep rule costs between GPUs, beside NCCL's all-reduce."""
    what = "sums over ranks in one order, beside all-reduce"
    output, why = check.worker("doctor")
    n_gpus = sum(line.startswith("gpu  ") for line in output.splitlines())
    if n_gpus < 2:
        return check.add(Line("speed", what, "SKIP", f"{n_gpus} GPU here, and it takes two"))
    start = time.monotonic()
    output, why = check.worker("bench", "sums", "--world-size", min(n_gpus, 8), "--json", *sizes, limit=BENCH_LIMIT)
    seconds = time.monotonic() - start
    if why:
        return check.add(Line("speed", what, "FAIL", f"{why}: {last_line(output)}", seconds=seconds))
    report = json.loads(last_line(output))
    for line in report["lines"]:
        note = f"{line['gather_us']:.1f} us for {line['all_reduce_us']:.1f} us, {report['world_size']} ranks"
        check.add(Line("speed", f"{what}: {line['n_rows']} rows", "PASS", note, line["ratio"], "times", seconds))


def judge(check, what, reaches, bound):
    goal = GOALS.get(what)
    if check.emulator:
        return "PASS", "the measurement works; its value means nothing"
    if goal is None or "H200" not in check.device:
        return "PASS", f"measured; the goal, {bound} {goal}, is an H200's" if goal else "measured"
    return "PASS" if reaches(goal) else "FAIL", f"goal: {bound} {goal}"


# === The table ===

def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"


def print_table(check):
    print(f"\nLockstep on {check.device}, {time.strftime('%Y-%m-%d')}")
    width = max((len(line.what) for line in check.lines), default=0)
    for line in check.lines:
        value = f"{line.value:,.1f} {line.unit}" if line.value is not None else f"{line.seconds:.1f} s"
        print(f"{line.verdict}  {line.part:<8} {line.what:<{width}} {value:>18}  {line.note}".rstrip())
    verdicts = [line.verdict for line in check.lines]
    print(f"{verdicts.count('PASS')} passed, {verdicts.count('FAIL')} failed, {verdicts.count('SKIP')} skipped")
    return 1 if "FAIL" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
