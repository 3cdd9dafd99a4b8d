"""Prints what this GPU does at best, by PyTorch, as one JSON object: the limits of decoding and of prefill."""

import json

import torch


def milliseconds(work, repeat):
    """The median time of a piece of work on the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeat // 2]


def main():
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), 20)
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    matmul_ms = milliseconds(lambda: a @ b, 20)
    print(json.dumps({
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        # Read and written.
        "copy_gb_per_s": 2 * source.numel() / copy_ms / 1e6,
        "matmul_tflop_per_s": 2 * n**3 / matmul_ms / 1e9,
    }))


if __name__ == "__main__":
    main()
