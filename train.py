"""Train a diffusion model: `python train.py` learns to draw cats. This is Algorithm 1 of DDPM as a program."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from processes import NoiseSchedule, add_noise, randn, sample, v_to_noise
from toolbox.data import SIZES, load_data
from toolbox.files import check_number, errors_in_one_sentence
from toolbox.models import card, load_model
from toolbox.pictures import loss_by_level, plot_training, save_grid
from toolbox.run import Run, all_processes, first_process_first, pick_device
from unet import UNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="cats", help=f"{', '.join(SIZES)}, or a folder of pictures")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/DATA); the same command goes on with it")
    parser.add_argument("--model", help="begin with the weights of this model.pt, or of a ready model")
    parser.add_argument("--steps", type=int, default=3700, help="training steps in all; more go on with a finished run")
    parser.add_argument("--size", type=int, help="pixels (default: the model's, or the data's own; 64 for a folder)")
    parser.add_argument("--batch", type=int, default=16, help="pictures in a step, of all processes together")
    parser.add_argument("--accumulate", type=int, default=1, help="work on a batch in so many parts; each needs less memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="(default: the faster one)")
    args = parser.parse_args()

    check_number("--seed", args.seed, 0, 2**32 - 1)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)  # the network's first weights
    if args.model:
        network, schedule, old = load_model(args.model)
        with first_process_first():
            data = load_data(args.data, args.size or old["size"])
        if old["channels"] != data.channels:
            raise ValueError(
                f"--model {args.model} draws pictures of {old['channels']} channels, and those of --data {args.data} have "
                f"{data.channels}: train without --model, or with a model of such pictures"
            )
    else:
        with first_process_first():
            data = load_data(args.data, args.size)
        large = {"widths": (16, 32, 64, 128, 192), "attention": (False, False, False, True, False)}  # thin where all pixels are
        network = UNet(data.channels, data.channels, **(large if data.size >= 64 else {}))
        schedule = NoiseSchedule.sigmoid()

    run = Run(
        folder=args.out or Path("runs") / data.name,
        network=network,
        data=data,
        card=card(network, schedule, data.size, data.name),
        settings={"model": args.model, "pictures": len(data.images), "their content": data.content},
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        device=device,
        precision=args.precision,
        accumulate=args.accumulate,
    )
    if run.k >= args.steps:
        print(f"{run.folder} holds this training, finished after {run.k} steps: more --steps go on, another --out begins anew")
        return
    run.announce()

    predict_noise = v_to_noise(run.fast(run.network), schedule)
    for x0 in run.batches():
        t = run.randint(schedule.T)  # a time step for each picture, all equally likely
        x_t, noise = add_noise(x0, t, schedule, run.randn_like(x0))
        loss = F.mse_loss(predict_noise(x_t, t), noise)  # math.md (7)
        run.step(loss)
        if run.pictures_due():
            show(run, schedule)


def show(run: Run, schedule: NoiseSchedule) -> None:
    """What the averaged network makes of 36 pieces of noise, always the same ones, and where its loss comes from."""
    predict_noise = v_to_noise(run.fast(run.averaged), schedule)
    generators = [torch.Generator().manual_seed(i) for i in range(36)]
    noise = randn((36, *run.data.images.shape[1:]), generators, device=run.device)
    save_grid(sample(predict_noise, noise, schedule, clip=True, generator=generators), run.folder / f"samples-{run.k:06}.png")
    levels = loss_by_level(predict_noise, run.pictures(64), schedule)
    plot_training(run.history, levels, run.folder / "loss.png")


if __name__ == "__main__":
    with errors_in_one_sentence(), all_processes():
        main()
