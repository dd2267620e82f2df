"""Our default network against diffusers' UNet2DModel of the same widths: `python tests/benchmark.py`.

The two take turns in one run, so that whatever else the machine does slows both alike; the ratio of the medians counts.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from test_unet import judge_for  # noqa: E402

from processes import NoiseSchedule, randn, sample  # noqa: E402
from toolbox.run import pick_device  # noqa: E402
from unet import UNet  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device")
    args = parser.parse_args()
    device = pick_device(args.device)
    ours = UNet().to(device)
    theirs = judge_for(ours.config).to(device)
    networks = {"ours": ours, "diffusers": lambda x, t: theirs(x, t).sample}
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.batch} pictures of {args.size} pixels"
    )
    print(f"parameters: {count(ours):,}; diffusers {count(theirs):,}\n")
    print("| step | precision | ours | diffusers | ours / diffusers |\n|---|---|---|---|---|")
    x, t = torch.randn(args.batch, 3, args.size, args.size, device=device), torch.randint(1000, (args.batch,), device=device)
    for name, function in {"training": training_step, "sampling": sampling_step}.items():
        for precision in (torch.float32, torch.bfloat16):
            seconds = {who: [] for who in networks}
            for _ in range(args.rounds + 1):
                for who, network in networks.items():
                    start = time.perf_counter()
                    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                        function(network, x, t)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds[who].append(time.perf_counter() - start)
            ours_s, theirs_s = (statistics.median(s[1:]) for s in seconds.values())  # the first round warms up
            print(
                f"| {name} | {str(precision)[6:]} | {ours_s:.3f} s | {theirs_s:.3f} s | {ours_s / theirs_s:.2f} |", flush=True
            )

    start = time.perf_counter()
    with torch.no_grad():
        sample(ours, randn((args.batch, 3, args.size, args.size), device=device), NoiseSchedule.linear(), clip=True)
    seconds = time.perf_counter() - start
    print(f"\n{args.batch} pictures by `sample` at its default steps: {seconds:.1f} s, {args.batch / seconds:.1f} a second")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print(f"peak memory of this process: {peak:.2f} GB")
    if device.type == "cuda":
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def count(network):
    return sum(p.numel() for p in network.parameters())


def training_step(network, x, t):
    torch.nn.functional.mse_loss(network(x, t), x).backward()


@torch.no_grad()
def sampling_step(network, x, t):
    network(x, t)


if __name__ == "__main__":
    main()
