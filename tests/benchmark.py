"""Our networks against the field's, of the same widths: `python tests/benchmark.py`, or with --v15 Stable Diffusion's U-Net.

    toy    unet.UNet(), diffusers' UNet2DModel with the same weights, lucidrains' Unet (pip install denoising-diffusion-pytorch)
    v1.5   unet.UNet with 860 million parameters, diffusers' UNet2DConditionModel

They take turns in one run, so that whatever else the machine does slows all alike; the ratio of the medians counts. Memory
is measured in a process for each, from before the network is made: weights, gradients, and what the step needs.
"""

import argparse
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from oracles import V15_UNET, their_unet  # noqa: E402
from test_unet import judge_for  # noqa: E402

from latent_ext.attention import SpatialTransformer  # noqa: E402
from processes import NoiseSchedule, randn, sample  # noqa: E402
from toolbox.run import keep_memory, pick_device  # noqa: E402
from unet import UNet  # noqa: E402


def lucidrains() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    attention = {"full_attn": (False, False, True, False), "attn_heads": 2, "attn_dim_head": 64}
    return Unet(dim=32, dim_mults=(1, 2, 4, 4), **attention)  # widths 32, 64, 128, 128; and linear attention where full is not


MAKE = {
    "toy": {"ours": UNet, "diffusers": lambda: judge_for(UNet().config), "lucidrains": lucidrains},
    "v1.5": {
        "ours": lambda: UNet(**V15_UNET, attention_block=SpatialTransformer),
        "diffusers": lambda: their_unet(V15_UNET),
    },
}


def make(kind: str, who: str, device: torch.device) -> nn.Module:
    """Channels last on a GPU, as train.py has it; the first weights are random numbers, of no use here."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return MAKE[kind][who]().to(device, memory_format=layout)


def inputs(kind: str, batch: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    x, t = torch.randn(batch, 3 if kind == "toy" else 4, size, size), torch.randint(1000, (batch,))
    return tuple(one.to(device) for one in ((x, t) if kind == "toy" else (x, t, torch.randn(batch, 77, 768))))


def training(network: nn.Module, *inputs: Tensor) -> None:
    """Forward and backward. The optimizer's step is the same for all, and is not in it."""
    y = network(*inputs)
    F.mse_loss(y if isinstance(y, Tensor) else y.sample, inputs[0]).backward()
    network.zero_grad()


@torch.no_grad()
def sampling(network: nn.Module, *inputs: Tensor) -> None:
    network(*inputs)


def seconds(step: Callable, network: nn.Module, inputs: tuple[Tensor, ...], precision: torch.dtype) -> float:
    start = time.perf_counter()
    with torch.autocast(inputs[0].device.type, precision, enabled=precision != torch.float32):
        step(network, *inputs)
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(step: Callable, kind: str, who: str, batch: int, size: int, device: torch.device) -> float:
    """Gigabytes that building this network and two steps of it add to a process (on a GPU: to its memory)."""
    keep_memory()
    before = memory(device)
    network, given = make(kind, who, device), inputs(kind, batch, size, device)
    for _ in range(2):
        seconds(step, network, given, torch.float32)
    return memory(device) - before


def memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    status = Path("/proc/self/status").read_text()  # Linux' getrusage begins with what the parent process had
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e6


def fastest(device: torch.device, precision: torch.dtype) -> float:
    """Operations a second in the product of two large matrices: what this machine can do at best."""
    x = torch.randn(2048, 2048, device=device, dtype=precision)
    return 2 * 2048**3 / min(seconds(lambda _, a: a @ a, None, (x,), torch.float32) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v15", action="store_true", help="Stable Diffusion's U-Net, one call")
    parser.add_argument("--batch", type=int, help="(default: 16 as train.py has it; --v15: 1)")
    parser.add_argument("--size", type=int, help="pixels, or latents (default: 32)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--device")
    args = parser.parse_args()
    device, kind = pick_device(args.device), "v1.5" if args.v15 else "toy"
    batch, size = args.batch or (1 if args.v15 else 16), args.size or 32
    keep_memory()
    steps = {"sampling": sampling} if args.v15 else {"training": training, "sampling": sampling}
    networks, given = {who: make(kind, who, device) for who in MAKE[kind]}, inputs(kind, batch, size, device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {batch} of {size} x {size} a step")
    for who, network in networks.items():
        print(f"{who}: {sum(p.numel() for p in network.parameters()):,} parameters")

    print(
        "\n| step | precision | network | seconds | ours / its | GFLOP | of the machine's best |\n|---|---|---|---|---|---|---|"
    )
    for precision in (getattr(torch, name) for name in args.precision):
        best = fastest(device, precision)
        for name, step in steps.items():
            times = {who: [] for who in networks}
            for _ in range(args.rounds + 1):
                for who, network in networks.items():
                    times[who].append(seconds(step, network, given, precision))
            times = {who: statistics.median(some[1:]) for who, some in times.items()}  # the first round warms up
            for who, s in times.items():
                with FlopCounterMode(display=False) as counter:
                    step(networks[who], *given)
                work = counter.get_total_flops()
                print(
                    f"| {name} | {str(precision)[6:]} | {who} | {s:.3f} | {times['ours'] / s:.2f} | {work / 1e9:.0f} | "
                    f"{100 * work / s / best:.0f} % of {best / 1e9:,.0f} GFLOP/s |",
                    flush=True,
                )

    print("\n| step | network | peak memory | ours / its |\n|---|---|---|---|")
    for name, step in steps.items():
        peaks = {}
        for who in networks:
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                peaks[who] = alone.apply(peak, (step, kind, who, batch, size, device))
            print(f"| {name} | {who} | {peaks[who]:.2f} GB | {peaks['ours'] / peaks[who]:.2f} |", flush=True)

    if kind == "toy":
        start = time.perf_counter()
        sample(networks["ours"], randn((64, 3, size, size), device=device), NoiseSchedule.linear(), clip=True)
        print(f"\n64 pictures by `sample` at its default steps: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
