"""The class-conditional U-Net in pixels: the core's training, with labels.

For one image in ten the labels are dropped, so the network also learns to predict the noise without
them; classifier-free guidance needs both (Ho & Salimans 2021, Algorithm 1).
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ext.data import preview_indices
from latent_ext.guidance import ClassUNet, guided
from processes import NoiseSchedule, add_noise, noise_from_v
from toolbox.data import Data
from toolbox.images import loss_by_level, plot_training, save_grid
from toolbox.models import model_config
from toolbox.run import Run
from toolbox.seeds import sample_seeds
from train import autocast, gradient_step, start_run, update_ema

STEPS, BATCH = 2200, 16
CHANNELS = (24, 48, 96, 96)  # as in the core
COND_DROP_PROB = 0.1
PREVIEW_SCALE = 3.0  # guidance scale
PREVIEW_CALLS = 94  # cost of a preview in network calls (measured): 40 x 2, 10 losses, plots


def train(args: argparse.Namespace, data: Data) -> None:
    torch.manual_seed(args.seed)  # the network's first weights
    sizes = {"in_channels": data.channels, "out_channels": data.channels, "channels": CHANNELS}
    network = ClassUNet(data.classes, **sizes)
    schedule = NoiseSchedule.sigmoid()
    config = model_config(network, schedule, data.size, data.name)
    null_labels = torch.zeros(1, len(data.classes), dtype=torch.long, device=args.device)
    example = torch.zeros(1, *data.images.shape[1:]), torch.zeros(1, dtype=torch.long), null_labels
    run = start_run(args, args.out, network, data, config, example, preview_calls=PREVIEW_CALLS)

    predict_noise = noise_from_v(run.model, schedule)
    for x0 in run.batches():
        t = run.timesteps(schedule.T)  # (B,)
        x_t, noise = add_noise(x0, t, schedule, run.randn_like(x0))
        labels = data.labels[run.indices].to(run.device) + 1  # (B, attributes); 0 is open
        labels[drop_condition(run)] = 0
        if labels.shape[1] > 1:
            for attribute in labels.T:  # (B,), a view: a prompt may leave some of them open
                attribute[drop_condition(run)] = 0
        with autocast(run.device, run.precision):
            loss = F.mse_loss(predict_noise(x_t, t, labels), noise)  # math.md (7)
        gradient_step(loss, run.network, run.optimizers, run.step, run.steps, run.precision)
        update_ema(run.ema, run.network, run.step)
        run.log(loss)
        if run.preview_due():
            labels = data.labels[preview_indices(data)].to(run.device) + 1
            log_samples(run, schedule, labels, null_labels)


def drop_condition(run: Run) -> Tensor:
    """(B,): True where this step drops the condition."""
    return run.randint(round(1 / COND_DROP_PROB)) == 0


def log_samples(
    run: Run,
    schedule: NoiseSchedule,
    context: Tensor,
    null_context: Tensor,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Samples of the EMA for the conditions of 36 images, and its loss on them by noise level.

    decode: for latents, whose x0 is not clipped because their range is unknown.
    """
    shape, indices = run.data.images.shape[1:], preview_indices(run.data)
    x0 = run.data.batch(indices, torch.zeros(len(indices), dtype=torch.bool)).to(run.device)
    predict_noise = noise_from_v(run.ema, schedule)
    conditional = guided(predict_noise, context, null_context)
    amplified = guided(predict_noise, context, null_context, PREVIEW_SCALE)
    with autocast(run.device, run.precision):
        levels = loss_by_level(conditional, x0, schedule)
        options = {"device": run.device, "clip_x0": decode is None}
        x = sample_seeds(amplified, shape, range(len(x0)), schedule, **options)
    save_grid(decode(x) if decode else x, run.folder / f"samples-{run.step:06}.png")
    plot_training(run.history, levels, run.folder / "loss.png")
