"""Our U-Net against others of the same size: `python -m benchmarks.speed`.

By default unet.UNet(), diffusers' UNet2DModel, and lucidrains' Unet if it is installed (pip install
denoising-diffusion-pytorch). A training step is whole: forward, backward, clipping, optimizer; ours
with Muon, AdamW and the EMA, the others with AdamW. With --v15 one call of Stable Diffusion's
U-Net, ours and diffusers'. The networks take turns, so that other work on the machine
slows all of them alike. Memory is measured in a new process, from before the network is made.
"""

import argparse
import copy
import functools
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latent_ext.attention import SpatialTransformer
from toolbox.device import pick_device, tune
from train import autocast, gradient_step, make_optimizers, update_ema
from unet import UNet

V15 = {"channels": (320, 640, 1280, 1280), "num_res_blocks": 2, "groups": 32, "heads": 8}
V15 |= {"in_channels": 4, "out_channels": 4, "attention_levels": (True, True, True, False)}


def diffusers_unet() -> nn.Module:
    """UNet() in diffusers' classes: the same layers, the same number of weights."""
    config = UNet().config
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in config["attention_levels"]]
    return UNet2DModel(
        block_out_channels=config["channels"],
        layers_per_block=config["num_res_blocks"],
        down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        attention_head_dim=config["channels"][-1] // config["heads"],
        norm_num_groups=config["groups"],
    )


def lucidrains_unet() -> nn.Module:
    """The same channels; linear attention where ours has none."""
    from denoising_diffusion_pytorch import Unet

    attention = {"full_attn": (False, False, True, False), "attn_heads": 2, "attn_dim_head": 64}
    return Unet(dim=32, dim_mults=(1, 2, 4, 4), **attention)


def v15_unet() -> nn.Module:
    return UNet(**V15, attention_block=functools.partial(SpatialTransformer, context_width=768))


TOY = {"ours": UNet, "diffusers": diffusers_unet, "lucidrains": lucidrains_unet}
LARGE = {"ours": v15_unet, "diffusers": lambda: UNet2DConditionModel(cross_attention_dim=768)}


def make_step(args: argparse.Namespace, name: str, training: bool) -> Callable[[str], None]:
    """A step of the network called `name`, as a function of the precision."""
    device, batch = pick_device(args.device), args.batch
    network = (LARGE if args.v15 else TOY)[name]().to(device)
    x = torch.randn(batch, 4 if args.v15 else 3, args.size, args.size)
    inputs = [x, torch.randint(1000, (batch,)), torch.randn(batch, 77, 768)]
    inputs = [given.to(device) for given in inputs[: 3 if args.v15 else 2]]
    if args.compile and name == "ours":
        network.compile()
    if training:
        tune(device)
    if training and name == "ours":
        ema, optimizers = copy.deepcopy(network), make_optimizers(network)
    elif training:
        optimizer = torch.optim.AdamW(network.parameters(), fused=device.type in ("cpu", "cuda"))

    def step(precision: str) -> None:
        with torch.set_grad_enabled(training), autocast(device, precision):
            y = network(*inputs)
            loss = F.mse_loss(y if isinstance(y, torch.Tensor) else y.sample, inputs[0])
        if training and name == "ours":
            gradient_step(loss, network, optimizers, 100, 1000, precision)
            update_ema(ema, network, 100)
        elif training:
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(args: argparse.Namespace, name: str, training: bool) -> float:
    """Gigabytes that the network and two steps add to a process (on a GPU: to its memory)."""
    before = memory_used()
    step = make_step(args, name, training)
    for _ in range(2):
        step("float32")
    return memory_used() - before


def memory_used() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":  # its getrusage starts from the parent process's peak
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--v15", action="store_true", help="Stable Diffusion's U-Net, one call")
    add("--batch", type=int, help="(default: 16; --v15: 1)")
    add("--size", type=int, default=32, help="pixels, or latents (default: 32)")
    add("--rounds", type=int, default=8, help="timed steps of each network (default: 8)")
    add("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    add("--compile", action="store_true", help="ours with torch.compile, which takes minutes")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    args = parser.parse_args()
    args.batch = args.batch or (1 if args.v15 else 16)
    names = [*(LARGE if args.v15 else TOY)]
    if "lucidrains" in names and find_spec("denoising_diffusion_pytorch") is None:
        names.remove("lucidrains")
    device, threads = pick_device(args.device), torch.get_num_threads()
    print(f"{device}, {threads} threads, torch {torch.__version__}, batches of {args.batch}\n")
    print("| step | precision | network | seconds | ours / its | GFLOP | memory |")
    print("|---" * 7 + "|")
    for training in [False] if args.v15 else [True, False]:
        steps = {name: make_step(args, name, training) for name in names}
        for precision in args.precision:
            seconds = {name: [] for name in names}
            for _ in range(args.rounds + 1):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step(precision)
                    seconds[name].append(time.perf_counter() - start)
            median = {name: statistics.median(each[1:]) for name, each in seconds.items()}
            for name, step in steps.items():
                with FlopCounterMode(display=False) as counter:
                    step(precision)
                with multiprocessing.get_context("spawn").Pool(1) as alone:
                    memory = alone.apply(peak_memory, (args, name, training))
                print(
                    f"| {'training' if training else 'one call'} | {precision} | {name} "
                    f"| {median[name]:.3f} | {median['ours'] / median[name]:.2f} "
                    f"| {counter.get_total_flops() / 1e9:.0f} | {memory:.2f} GB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
