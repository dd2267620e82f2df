"""Train a diffusion model: `python train.py` learns to draw cats (Algorithm 1 of DDPM)."""

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from processes import NoiseSchedule, add_noise
from toolbox.data import SIZES, Data, from_uint8, load_data
from toolbox.device import distributed, first_process_first, pick_device
from toolbox.files import UserError, check_number, user_errors
from toolbox.images import loss_by_level, plot_training, save_grid
from toolbox.models import PREDICTIONS, SCHEDULES, load_model, model_config
from toolbox.muon import Muon
from toolbox.run import Run
from toolbox.seeds import sample_seeds
from toolbox.timing import announce
from unet import UNet

LEARNING_RATE = 3e-3
WARM_UP = 50  # steps
MAX_GRAD_NORM = 1.0
LARGE = {  # from 64 pixels on: one more level, and fewer channels at high resolution
    "channels": (16, 32, 64, 128, 192),
    "attention_levels": (False, False, False, True, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", default="cats", help=f"{', '.join(SIZES)}, or a folder of images (default: cats)")
    add("--out", type=Path, help="the run's folder (default: runs/DATA); the same one resumes")
    add("--model", help="start from the weights of this model.pt, or of a pretrained model")
    add("--steps", type=int, default=3300, help="total; more continue a run (default: 3300)")
    add("--size", type=int, help="pixels (default: the data's own; 64 for a folder)")
    add("--batch", type=int, default=16, help="images in a step (default: 16)")
    add("--schedule", default="sigmoid", choices=SCHEDULES, help="default: sigmoid, or --model's")
    add("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    add("--precision", choices=["float32", "bfloat16"], help="default: whichever is faster here")
    args = parser.parse_args()

    check_number("--seed", args.seed, 0, 2**32 - 1)
    args.device = pick_device(args.device)
    torch.manual_seed(args.seed)  # the network's first weights
    if args.model:
        network, schedule, old = load_model(args.model)
        args.size, prediction = args.size or old["size"], old["prediction"]
    with first_process_first():
        data = load_data(args.data, args.size)
    if not args.model:
        schedule = SCHEDULES[args.schedule]()
        prediction = "velocity" if args.schedule == "flow" else "v"
        network = UNet(data.channels, data.channels, **(LARGE if data.size >= 64 else {}))
    elif old["channels"] != data.channels:
        raise UserError(
            f"--model {args.model}: expected data of {old['channels']} channels, got "
            f"{data.channels}; train without --model, or with a model of such images"
        )
    checksum = {"data_checksum": data.checksum}  # evaluate.py notices other images
    config = model_config(network, schedule, data.size, data.name, prediction, **checksum)
    example = torch.zeros(1, *data.images.shape[1:]), torch.zeros(1, dtype=torch.long)
    folder, settings = args.out or Path("runs") / data.name, {"model": args.model}
    run = start_run(args, folder, network, data, config, example, settings)

    predict_noise = PREDICTIONS[prediction](run.model, schedule)
    for x0 in run.batches():
        t = run.timesteps(schedule.T)  # (B,), a time step for each image, all equally likely
        x_t, noise = add_noise(x0, t, schedule, run.randn_like(x0))
        with autocast(run.device, run.precision):
            loss = F.mse_loss(predict_noise(x_t, t), noise)  # math.md (7)
        gradient_step(loss, run.network, run.optimizers, run.step, run.steps, run.precision)
        update_ema(run.ema, run.network, run.step)
        run.log(loss)
        if run.preview_due():
            log_samples(run, PREDICTIONS[prediction](run.ema, schedule), schedule)


# ---- the recipe, which the trainings of latent_ext share -----------------------------------------


def make_optimizers(network: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (toolbox/muon.py) for matrices and kernels, AdamW for biases and norms."""
    matrices = [w for w in network.parameters() if w.ndim > 1]
    vectors = [w for w in network.parameters() if w.ndim < 2]
    fused = vectors[0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(vectors, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=fused)
    return [Muon(matrices, lr=LEARNING_RATE), adamw]


def gradient_step(
    loss: Tensor, network: nn.Module, optimizers: Sequence, step: int, steps: int, precision: str
) -> None:
    """Backward, clip the gradient, update the weights; precision: of Muon's matrix products."""
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
    if not (loss + grad_norm).isfinite():
        raise UserError(
            f"step {step + 1}: the loss is {loss:.3g}, the gradient norm {grad_norm:.3g}; learning "
            "on would destroy the network. Its last checkpoint is kept; look for broken images in "
            "the data, or try --precision float32"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with autocast(loss.device, precision):
            optimizer.step()
        optimizer.zero_grad()


def learning_rate(step: int, steps: int) -> float:
    """Up for WARM_UP steps, while the optimizers' averages settle; then linearly down to 0."""
    return LEARNING_RATE * min((step + 1) / WARM_UP, 1 - step / steps)


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, steadier than the latest ones.

    It averages over roughly the last ninth of the run so far, so that it forgets the random start.
    """
    decay = min(0.9999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """In bfloat16, convolutions and products have 8 significant bits; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


# ---- before and after ----------------------------------------------------------------------------


def start_run(
    args: argparse.Namespace,
    folder: Path,
    network: nn.Module,
    data: Data,
    config: dict,
    example: Sequence[Tensor],
    settings: dict | None = None,
    preview_calls: int = 60,
) -> Run:
    """A new run, or the one that the folder holds; says how long it will take.

    example: inputs of the network for one image. preview_calls: network calls of 36 images each in
    a preview; by default 40 of them sample, the others measure the loss by level.
    """
    network.to(args.device)
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    settings = {"images": len(data.images), "checksum": data.checksum} | (settings or {})
    numbers = args.steps, args.batch, args.seed, args.device, args.precision
    run = Run(folder, network, ema, make_optimizers(network), data, config, settings, *numbers)

    network, ema = copy.deepcopy((network, ema))  # for timing
    optimizers = make_optimizers(network)

    def step(precision: str) -> None:
        with autocast(run.device, precision):
            outputs = network(*(x.expand(run.shard, *x.shape[1:]).to(run.device) for x in example))
        loss = sum(y.float().square().mean() for y in outputs)  # only its time counts
        gradient_step(loss, network, optimizers, 0, run.steps, precision)
        update_ema(ema, network, 0)

    @torch.no_grad()
    def preview_call(precision: str) -> None:
        with autocast(run.device, precision):
            ema(*(x.expand(36, *x.shape[1:]).to(run.device) for x in example))

    announce(run, step, preview_call, preview_calls)
    return run


def log_samples(run: Run, predict_noise: Callable, schedule: NoiseSchedule) -> None:
    """Samples of the EMA from the same 36 noise images each time, and its loss by noise level."""
    shape, x0 = run.data.images.shape[1:], from_uint8(run.data.images[:64]).to(run.device)
    with autocast(run.device, run.precision):
        x = sample_seeds(predict_noise, shape, range(36), schedule, run.device, clip_x0=True)
        levels = loss_by_level(predict_noise, x0, schedule)
    save_grid(x, run.folder / f"samples-{run.step:06}.png")
    plot_training(run.history, levels, run.folder / "loss.png")


if __name__ == "__main__":
    with user_errors(), distributed():
        main()
