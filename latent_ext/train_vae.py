"""Train the VAE: images pass through small latents and should come back unchanged.

The loss is the squared error plus a little KL divergence. Stable Diffusion's VAE also had a
perceptual and an adversarial loss (Rombach et al. 2022, appendix G), which make invented texture
look real; drawn cats have no texture.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from latent_ext.data import preview_indices
from latent_ext.vae import VAE, kl_divergence
from toolbox.data import Data, from_uint8, load_data
from toolbox.images import plot_training, save_grid
from train import autocast, gradient_step, start_run, update_ema

STEPS, BATCH = 4500, 4
CHANNELS = (16, 32, 64)
KL_WEIGHT = 1e-6  # only keeps the latents' variances from vanishing: math.md, section 10
PREVIEW_CALLS = 2  # cost of a preview in network calls (measured): reconstruction and grid


def train(args: argparse.Namespace, data: Data, latent_channels: int = 4) -> None:
    torch.manual_seed(args.seed)  # the network's first weights
    network = VAE(data.channels, latent_channels, CHANNELS)
    side = data.size // network.downsampling
    z = torch.zeros(1, latent_channels, side, side)
    example = torch.zeros(1, *data.images.shape[1:]), z
    config = {"network": network.config}
    held_out = load_data(args.data, data.size, held_out=True)
    folder = args.out / "training" / "vae"
    run = start_run(args, folder, network, data, config, example, preview_calls=PREVIEW_CALLS)

    for x0 in run.batches():
        with autocast(run.device, run.precision):
            x, mean, logvar = run.model(x0, run.randn_like(z))
        kl = kl_divergence(mean.float(), logvar.float())  # math.md (16)
        loss = F.mse_loss(x.float(), x0) + KL_WEIGHT * kl
        gradient_step(loss, run.network, run.optimizers, run.step, run.steps, run.precision)
        update_ema(run.ema, run.network, run.step)
        run.log(loss)
        if run.preview_due():
            x0 = from_uint8(held_out.images[preview_indices(held_out)]).to(run.device)
            x = reconstruct(run.ema, x0)
            tqdm.write(f"step {run.step}: a PSNR of {psnr(x, x0):.1f} dB on held-out images")
            pairs = torch.stack([x0, x], dim=1).flatten(0, 1)
            save_grid(pairs, run.folder / f"pairs-{run.step:06}.png", columns=12)
            plot_training(run.history, {}, run.folder / "loss.png")


@torch.no_grad()
def reconstruct(vae: VAE, x0: Tensor) -> Tensor:
    """Encode and decode (N, C, H, W), without noise in between."""
    return torch.cat([vae.decode(vae.encode(part)[0]) for part in x0.split(32)])


def psnr(x: Tensor, x0: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, for images in [-1, 1].

    20 where the error is a tenth of the way from black to white, 40 where it is a hundredth.
    """
    return -10 * (x.clamp(-1, 1) / 2 - x0 / 2).square().mean().log10().item()
