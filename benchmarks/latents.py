"""What do latents buy? Two unconditional models of the same photographs: in pixels, in latents.

    python train.py --data PHOTOS --out runs/pixels --steps N
    python -m benchmarks.latents --data PHOTOS

The second command trains a VAE, then the pixel model's U-Net without its two upper levels on the
latents, which are a quarter as high and wide: the VAE takes the place of these levels. Both say how
long they will take; choose the steps so that both need as many minutes. It then judges both by
their samples. The table's first line, images that were only encoded and decoded, is the best that
this VAE allows.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import resize
from tqdm import tqdm

from evaluate import BATCH, report_copies
from latent_ext import train_vae
from latent_ext.data import encode_data
from latent_ext.train_vae import psnr, reconstruct
from latent_ext.vae import VAE
from processes import Network, NoiseSchedule, add_noise, noise_from_v, snr_pairs
from toolbox import metrics
from toolbox.data import Data, from_uint8, load_data, to_uint8
from toolbox.device import pick_device
from toolbox.files import user_errors
from toolbox.images import grid, save_plot
from toolbox.models import load_model, predict_noise_of, read
from toolbox.run import Run
from toolbox.seeds import sample_seeds
from train import LARGE, autocast, gradient_step, start_run, update_ema
from unet import UNet

LATENT_CHANNELS = 8  # with 4, as in Stable Diffusion, photographs of 64 pixels become blurred
UNET = {name: values[2:] for name, values in LARGE.items()}  # from 16x16 down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="a folder of images, or a name as for train.py")
    add("--pixels", type=Path, default="runs/pixels/model.pt", help="the model of train.py")
    add("--out", type=Path, default=Path("runs/latents"), help="folder of the trainings")
    add("--vae-steps", type=int, default=9000, help="steps of the VAE (default: 9000)")
    add("--steps", type=int, default=17000, help="steps of the U-Net on latents (default: 17000)")
    add("--n", type=int, default=1000, help="samples per model (default: 1000)")
    args = parser.parse_args()
    args.device, args.precision, args.seed = pick_device(), None, 0
    network, pixel_schedule, config = load_model(args.pixels, args.device)
    data, held_out = (load_data(args.data, config["size"], held_out=h) for h in (False, True))

    vae_args = argparse.Namespace(**vars(args) | {"steps": args.vae_steps, "batch": 4})
    train_vae.train(vae_args, data, LATENT_CHANNELS)
    content = read(args.out / "training" / "vae" / "model.pt")
    vae = VAE(**content["network"]).to(args.device)
    vae.load_state_dict(content["weights"])
    run, schedule, decode = train_unet(args, vae, data)

    in_pixels = predict_noise_of(network, pixel_schedule, config)
    with autocast(run.device, run.precision):
        x0 = from_uint8(metrics.evenly_spaced(held_out.images, args.n)).to(run.device)
        decoded = reconstruct(vae, x0)
        shape = run.data.images.shape[1:]
        samples = {
            "pixels": draw(in_pixels, pixel_schedule, x0.shape[1:], args),
            "latents": draw(noise_from_v(run.ema, schedule), schedule, shape, args, decode),
        }
    print(f"VAE: a PSNR of {psnr(decoded, x0):.1f} dB on held-out images")
    report(samples, to_uint8(decoded).cpu(), data)
    for name, images in samples.items():
        print(f"{name}:")
        report_copies(images, data, held_out)

    figure, panels = plt.subplots(1, 2, figsize=(16, 8), layout="constrained")
    for axes, (name, images) in zip(panels, samples.items(), strict=True):
        axes.imshow(grid(from_uint8(images[:64])))
        axes.set_title(name)
        axes.axis("off")
    save_plot(figure, args.out / "latents.png")


def train_unet(
    args: argparse.Namespace, vae: VAE, data: Data
) -> tuple[Run, NoiseSchedule, Callable]:
    """The loop of train.py on the VAE's latents; also how a latent becomes an image."""
    torch.manual_seed(args.seed)
    latents, schedule = encode_data(vae, data), NoiseSchedule.cosine()
    shape = latents.images.shape[1:]
    unet = UNet(shape[0], shape[0], **UNET)
    example = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long)
    folder, settings = args.out / "training" / "unet", {"network": unet.config}
    unet_args = argparse.Namespace(**vars(args) | {"batch": 16})
    run = start_run(unet_args, folder, unet, latents, settings, example, preview_calls=0)
    predict_noise = noise_from_v(run.model, schedule)
    for z0 in run.batches():
        t = run.timesteps(schedule.T)
        z_t, noise = add_noise(z0, t, schedule, run.randn_like(z0))
        with autocast(run.device, run.precision):
            loss = F.mse_loss(predict_noise(z_t, t), noise)
        gradient_step(loss, run.network, run.optimizers, run.step, run.steps, run.precision)
        update_ema(run.ema, run.network, run.step)
        run.log(loss)
    return run, schedule, lambda z0: vae.decode(z0 / latents.scaling_factor)


@torch.no_grad()
def draw(
    predict_noise: Network,
    schedule: NoiseSchedule,
    shape: Sequence[int],
    args: argparse.Namespace,
    decode: Callable | None = None,
) -> Tensor:
    """args.n samples, uint8 (N, C, H, W): 40 calls of second order, as photographs need it."""
    options = {"device": args.device, "timesteps": snr_pairs(schedule, 40), "order": 2}
    options["clip_x0"] = decode is None  # latents have no bounds
    images = []
    for seeds in tqdm(torch.arange(args.n).split(BATCH), desc="sampling"):
        x0 = sample_seeds(predict_noise, shape, seeds.tolist(), schedule, **options)
        images.append(to_uint8(x0 if decode is None else decode(x0)).cpu())
    return torch.cat(images)


def report(samples: dict[str, Tensor], decoded: Tensor, data: Data) -> None:
    """KID sees texture above all; of images made smaller, it sees the shape of the whole."""
    classifier = metrics.feature_net(data)
    real = metrics.evenly_spaced(data.images, metrics.MAX_REAL)
    sizes = [data.size, data.size // 2]
    print("| |", " | ".join(f"KID x 1000 at {size} px" for size in sizes), "|\n|---|---|---|")
    for name, images in ({"encoded and decoded": decoded} | samples).items():
        line = f"| {name} |"
        for size in sizes:
            features = [
                classifier.extract_features(resize(x, [size], antialias=True))
                for x in (images, real)
            ]
            kid, error = metrics.jackknife(metrics.kernel_distance, *features)
            line += f" {1000 * kid:.0f} +- {1000 * error:.0f} |"
        print(line, flush=True)


if __name__ == "__main__":
    with user_errors():
        main()
