"""The U-Net of Stable Diffusion: the core's training, on the VAE's latents, with captions.

As in train_classes.py, one image in ten loses its condition: here its caption becomes empty.
"""

import argparse
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Rules

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.data import VARIANTS, caption_variants, encode_data, preview_indices
from latent_ext.pipeline import Pipeline
from latent_ext.stable_diffusion import save
from latent_ext.train_classes import PREVIEW_CALLS, drop_condition, log_samples
from latent_ext.vae import VAE
from processes import NoiseSchedule, add_noise, noise_from_v
from toolbox.data import Data
from toolbox.device import RANK
from toolbox.files import UserError
from toolbox.models import read, same_network
from train import autocast, gradient_step, start_run, update_ema
from unet import UNet

STEPS, BATCH = 2400, 16
UNET = {"channels": (64, 128, 160), "attention_levels": (False, True, False), "heads": 4}


def train(args: argparse.Namespace, data: Data) -> None:
    vae, text_encoder, tokenizer, checksums = load_parts(args.out / "training", args.device)
    captions, variants = caption_variants(data.captions)
    with torch.no_grad():
        tokens = tokenizer(captions).to(args.device).split(256)
        contexts = torch.cat([text_encoder(part) for part in tokens])  # (captions, length, width)
    latents = encode_data(vae, data)
    vae.scaling_factor = latents.scaling_factor

    torch.manual_seed(args.seed)  # the network's first weights
    channels = vae.config["latent_channels"]
    attention = partial(SpatialTransformer, context_width=contexts.shape[2])
    network = UNet(channels, channels, attention_block=attention, **UNET)
    schedule = NoiseSchedule.cosine()
    parts = network, vae, text_encoder, tokenizer, schedule
    pipeline = Pipeline(*parts, data.size, prediction="v_prediction", spacing="trailing")
    config, settings = {"network": network.config}, {"vae and clip": checksums}
    z = torch.zeros(1, *latents.images.shape[1:])
    example = z, torch.zeros(1, dtype=torch.long), contexts[:1]
    folder = args.out / "training" / "unet"
    run = start_run(args, folder, network, latents, config, example, settings, PREVIEW_CALLS)

    predict_noise = noise_from_v(run.model, schedule)
    for z0 in run.batches():
        t = run.timesteps(schedule.T)  # (B,)
        z_t, noise = add_noise(z0, t, schedule, run.randn_like(z0))
        choices = variants[run.indices].to(run.device)  # (B, VARIANTS)
        chosen = choices.gather(1, run.randint(VARIANTS)[:, None])[:, 0]  # (B,)
        chosen[drop_condition(run)] = 0  # the empty caption
        with autocast(run.device, run.precision):
            loss = F.mse_loss(predict_noise(z_t, t, contexts[chosen]), noise)  # math.md (7)
        gradient_step(loss, run.network, run.optimizers, run.step, run.steps, run.precision)
        update_ema(run.ema, run.network, run.step)
        run.log(loss)
        if run.preview_due():
            context = contexts[variants[preview_indices(latents), 0]]
            log_samples(run, schedule, context, contexts[:1], pipeline.decode)
            save(replace(pipeline, unet=run.ema), args.out)
    if RANK == 0:  # again, in case a kill interrupted the last preview
        save(replace(pipeline, unet=run.ema), args.out)
    print(f"to draw with it: python -m latent_ext.generate PROMPT --model {args.out}")


def load_parts(
    folder: Path, device: torch.device
) -> tuple[VAE, TextEncoder, Tokenizer, dict[str, int]]:
    """What the trainings of vae and clip saved, and the checksums of those files."""
    content, checksums = {}, {}
    for part in ("vae", "clip"):
        path = folder / part / "model.pt"
        if not path.exists():
            raise UserError(f"{path} is missing: first run python -m latent_ext.train {part}")
        content[part], checksums[part] = read(path), zlib.crc32(path.read_bytes())
    with same_network(folder):
        vae = VAE(**content["vae"]["network"])
        vae.load_state_dict(content["vae"]["weights"])
        text_encoder = TextEncoder(**content["clip"]["network"])
        weights = content["clip"]["weights"].items()
        weights = {name.removeprefix("text."): w for name, w in weights if name.startswith("text.")}
        text_encoder.load_state_dict(weights)
    tokenizer = Tokenizer(Rules.from_str(content["clip"]["words"]), text_encoder.config["length"])
    return vae.to(device).eval(), text_encoder.to(device).eval(), tokenizer, checksums
