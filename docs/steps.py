"""How few steps are enough? `python docs/steps.py` draws 256 cats in each of several ways, judges them, plots docs/steps.png.

The time goes with the sum of the steps, so most of it is for 1,000 of them, twice; leave them out with --steps.
"""

import argparse
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from processes import v_to_noise  # noqa: E402
from toolbox.data import load_data  # noqa: E402
from toolbox.metrics import Judge, feature_net, kernel_distance, two_parts, with_error  # noqa: E402
from toolbox.models import load_model  # noqa: E402
from toolbox.run import pick_device  # noqa: E402

WAYS = {1.0: "eta 1: DDPM, with longer strides", 0.0: "eta 0: DDIM"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cats")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40, 50, 100, 250, 1000])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "steps.png")
    args = parser.parse_args()
    device = pick_device()
    network, schedule, about = load_model(args.model, device)
    data, held_out = (load_data(about["data"], about["size"], held_out=part) for part in (False, True))
    predict_noise, shape = v_to_noise(network, schedule), (data.channels, data.size, data.size)
    classifier = feature_net(data)
    judge, real = Judge(classifier, data, held_out), classifier.see(two_parts(data.images, args.n)[1])

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    print(
        "| steps | eta | clean, of 100 | near the data | sure of all attributes | KID x 1000 | seconds |\n" + "|---" * 7 + "|"
    )
    for eta, name in WAYS.items():
        clean, distance = [], []
        for steps in args.steps:
            start = time.perf_counter()
            pictures = evaluate.draw(predict_noise, schedule, shape, range(args.n), steps, eta, device)
            features = classifier.see(pictures)
            near, sure = judge.distance(features) <= judge.reach, torch.stack([*judge.sure(features).values()]).all(0)
            kid, error = (1000 * x for x in with_error(kernel_distance, features, real))
            shares = [100 * share.float().mean().item() for share in (near & sure, near, sure)]
            clean.append(shares[0])
            distance.append((kid, error))
            told = " | ".join(f"{share:.0f}" for share in shares)
            print(
                f"| {steps} | {eta:.0f} | {told} | {kid:.0f} +- {error:.0f} | {time.perf_counter() - start:.0f} |", flush=True
            )
        panels[0].plot(args.steps, clean, marker="o", label=name)
        panels[1].errorbar(args.steps, *zip(*distance, strict=True), marker="o", capsize=3, label=name)
    panels[0].set(ylabel="clean samples, of 100")
    panels[1].set(ylabel="KID x 1000, our features", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="network calls", xscale="log")
        panel.set_xticks(args.steps, args.steps)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(args.out, dpi=100)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
