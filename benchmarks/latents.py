"""What do latents buy? Two unconditional models of the same images: one in pixels, one in latents.

    python train.py --data PHOTOS --out runs/pixels
    python -m latent_ext.train vae --data PHOTOS --out runs/latents
    python -m benchmarks.latents --data PHOTOS --steps N

The last command trains a U-Net on the VAE's latents, and judges both models by their samples. Give
the VAE and this U-Net together as many minutes as the model in pixels. The table's first line,
images that were only encoded and decoded, is the best that this VAE allows.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluate import BATCH, generate, report_copies
from latent_ext.data import encode_data
from latent_ext.train_vae import psnr, reconstruct
from latent_ext.vae import VAE
from processes import NoiseSchedule, add_noise, noise_from_v
from toolbox import metrics
from toolbox.data import from_uint8, load_data, to_uint8
from toolbox.device import pick_device
from toolbox.files import user_errors
from toolbox.images import save_grid
from toolbox.models import load_model, predict_noise_of, read
from toolbox.seeds import sample_seeds
from train import autocast, gradient_step, start_run
from unet import UNet

SIZES = {"channels": (64, 128, 160), "attention_levels": (False, True, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="a folder of images, or a name as for train.py")
    add("--pixels", type=Path, default="runs/pixels/model.pt", help="the model of train.py")
    add("--vae", type=Path, default="runs/latents/training/vae/model.pt", help="the VAE")
    add("--out", type=Path, default=Path("runs/latents/unconditional"), help="folder of the run")
    add("--steps", type=int, default=6000, help="steps of the U-Net on latents (default: 6000)")
    add("--batch", type=int, default=16, help="images per step (default: 16)")
    add("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    add("--n", type=int, default=1000, help="samples per model (default: 1000)")
    add("--precision", choices=["float32", "bfloat16"], help="(default: the faster one)")
    args = parser.parse_args()
    args.device = pick_device()
    network, pixel_schedule, config = load_model(args.pixels, args.device)
    data, held_out = (load_data(args.data, config["size"], held_out=h) for h in (False, True))
    content = read(args.vae)
    vae = VAE(**content["network"]).to(args.device)
    vae.load_state_dict(content["weights"])

    torch.manual_seed(args.seed)
    latents, schedule = encode_data(vae, data), NoiseSchedule.cosine()
    shape = latents.images.shape[1:]
    unet = UNet(shape[0], shape[0], **SIZES)
    example = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long)
    settings = {"network": unet.config}
    run = start_run(args, args.out, unet, latents, settings, example, preview_calls=0)
    predict_noise = noise_from_v(run.model, schedule)
    for z0 in run.batches():
        t = run.timesteps(schedule.T)
        z_t, noise = add_noise(z0, t, schedule, run.randn_like(z0))
        with autocast(run.device, run.precision):
            loss = F.mse_loss(predict_noise(z_t, t), noise)
        gradient_step(loss, run.network, run.ema, run.optimizers, run.step, run.steps)
        run.log(loss)

    def decode(z):
        return to_uint8(vae.decode(z / latents.scaling_factor)).cpu()

    predict_noise, seeds = noise_from_v(run.ema, schedule), range(args.n)
    with torch.no_grad(), autocast(run.device, run.precision):
        x0 = from_uint8(metrics.evenly_spaced(held_out.images, args.n)).to(run.device)
        decoded = reconstruct(vae, x0)
        print(f"VAE: a PSNR of {psnr(decoded, x0):.1f} dB on held-out images")
        batches = [seeds[i : i + BATCH] for i in seeds[::BATCH]]
        options = {"schedule": schedule, "device": run.device}
        drawn = [
            decode(sample_seeds(predict_noise, shape, batch, **options))
            for batch in tqdm(batches, desc="latents")
        ]
        options["schedule"] = pixel_schedule
        pixels = predict_noise_of(network, pixel_schedule, config)
        painted = generate(pixels, data.images.shape[1:], seeds, **options)

    images = {"encoded and decoded": to_uint8(decoded).cpu()}
    images |= {"latents": torch.cat(drawn), "pixels": painted}
    classifier = metrics.feature_net(data)
    real = classifier.extract_features(metrics.evenly_spaced(data.images, metrics.MAX_REAL))
    print("| | KID x 1000 |\n|---|---|")
    for name, x in images.items():
        features = classifier.extract_features(x)
        kid, error = metrics.jackknife(metrics.kernel_distance, features, real)
        print(f"| {name} | {1000 * kid:.0f} +- {1000 * error:.0f} |", flush=True)
        save_grid(from_uint8(x[:64]), args.out / f"{name.replace(' ', '-')}.png")
    for name, x in images.items():
        print(f"{name}:")
        report_copies(x, data, held_out)


if __name__ == "__main__":
    with user_errors():
        main()
