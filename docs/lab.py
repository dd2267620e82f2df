"""The experiments of docs/lab.md: `python -m docs.lab 1` trains the first and draws lab-1.png.

Cats of 16x16 pixels, a small U-Net, one core. Several experiments in one command share trainings:
`python -m docs.lab 5 6 7 8`. The images are written to runs/lab/.
"""

import argparse
import copy
import functools
import itertools
import types
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from evaluate import generate
from processes import (
    NoiseSchedule,
    add_noise,
    noise_from_v,
    randn_like,
    sample,
    snr_pairs,
    timestep_pairs,
)
from toolbox.cats import draw
from toolbox.data import from_uint8, load_data
from toolbox.files import user_errors
from toolbox.images import grid, save_image, save_plot, to_image
from toolbox.metrics import (
    Judge,
    LinearDenoiser,
    evenly_spaced,
    feature_net,
    jackknife,
    kernel_distance,
    split,
)
from toolbox.models import load_model, predict_noise_of
from toolbox.seeds import generators
from train import make_optimizers, update_ema
from unet import UNet

ROOT = Path(__file__).parent.parent
OUT = Path("runs/lab")
TRAINING_STEPS, BATCH = 400, 32
CALLS = 40  # network calls per sample
COSINE, LINEAR = NoiseSchedule.cosine(), NoiseSchedule.linear()
COLUMNS = 10  # images in a row
NOISE = randn_like(torch.empty(COLUMNS, 3, 16, 16), generators(range(COLUMNS)))
LABELS = 230  # pixels to the left of the rows, for their labels
Rows = dict[str, Tensor]  # what a row shows -> its images


@functools.cache
def cats() -> Tensor:
    return draw(4096, 16)[0]


@functools.cache
def train(
    loss: Callable, images: Callable[[], Tensor] = cats, groups: int = 1
) -> tuple[UNet, UNet]:
    """Minimise loss(network, x0). Returns the last weights, and their moving average."""
    torch.manual_seed(0)
    levels = {"channels": (32, 64, 64), "attention_levels": (False, False, True)}
    network = UNet(**levels, groups=groups)
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizers = make_optimizers(network)  # a constant learning rate: see experiment 8
    recent = []
    for step in (bar := tqdm(range(1, TRAINING_STEPS + 1), desc=loss.__name__)):
        x0 = images()[torch.randint(len(images()), (BATCH,))]
        value = loss(network, x0)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(ema, network, step)
        recent = [*recent[-49:], value.item()]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
    return network.requires_grad_(False), ema


def print_tints(rows: Rows) -> Rows:
    """Print how far each row's mean colour is from the data's; return the rows unchanged."""
    for name, row in rows.items():
        tint = row.clamp(-1, 1).mean((0, 2, 3)) - cats().mean((0, 2, 3))
        print(f"{name:{24}} red {tint[0]:+.2f}, green {tint[1]:+.2f}, blue {tint[2]:+.2f}")
    return rows


# ---- 1: noise in, cat out ------------------------------------------------------------------------


def one_leap(network, x0):
    noise = torch.randn_like(x0)
    return F.mse_loss(network(noise, no_time(x0)), x0)


def no_time(x: Tensor) -> Tensor:
    """The U-Net expects a time step; this one says nothing."""
    return torch.zeros(len(x))  # t = 0 for every image


def experiment_1() -> Rows:
    network, _ = train(one_leap)
    return {"network(noise)": network(NOISE, no_time(NOISE))}


# ---- 2: an easier question, and its answer asked again -------------------------------------------


def x0_from_mixture(network, x0):
    s = torch.rand(len(x0), 1, 1, 1)  # the share of noise
    x = (1 - s) * x0 + s * torch.randn_like(x0)
    return F.mse_loss(network(x, no_time(x0)), x0)


def experiment_2() -> Rows:
    network, _ = train(x0_from_mixture)
    s = torch.linspace(0.1, 1, COLUMNS).view(-1, 1, 1, 1)
    x = (1 - s) * cats()[7] + s * NOISE
    answers = [NOISE]
    for _ in range(COLUMNS - 1):
        answers.append(network(answers[-1], no_time(NOISE)))  # its answer is the next question
    return {
        "x, s = 0.1 .. 1": x,
        "network(x)": network(x, no_time(x)),
        "asked again and again": torch.cat([answer[:1] for answer in answers]),
        "where 10 noises end": answers[-1],
    }


# ---- 3: only a little way towards the answer -----------------------------------------------------


def x0_from_mixture_and_s(network, x0):
    s = torch.rand(len(x0), 1, 1, 1)
    x = (1 - s) * x0 + s * torch.randn_like(x0)
    return F.mse_loss(network(x, 1000 * s.flatten()), x0)  # scaled like t


def small_steps(network, x, steps, with_s):
    for left in range(steps, 0, -1):
        s = torch.full((len(x),), left / steps)  # 1 is pure noise, 0 an image
        x0 = network(x, 1000 * s if with_s else no_time(x))  # scaled like t
        x = x + (x0 - x) / left  # the last time, all of the way
    return x


def experiment_3() -> Rows:
    network, _ = train(x0_from_mixture)
    rows = {f"without s, {CALLS} steps": small_steps(network, NOISE, CALLS, with_s=False)}
    network, _ = train(x0_from_mixture_and_s)
    for steps in (2, 5, CALLS):
        rows[f"with s, {steps} steps"] = small_steps(network, NOISE, steps, with_s=True)
    return print_tints(rows)


# ---- 4: how to mix -------------------------------------------------------------------------------


def experiment_4() -> Rows:
    t = torch.linspace(0, 999, COLUMNS).long()
    x0 = cats()[7].expand(COLUMNS, -1, -1, -1)
    s = (t / 999).view(-1, 1, 1, 1)
    rows = {"straight line": (1 - s) * x0 + s * NOISE}
    for schedule in (COSINE, LINEAR):
        rows[f"{schedule.name} schedule"] = add_noise(x0, t, schedule, NOISE)[0]
    for name, row in rows.items():
        print(f"{name:16} standard deviation", " ".join(f"{x.std():.2f}" for x in row))
    return {name: row / 2 for name, row in rows.items()}  # or values beyond -1 .. 1 would be cut


# ---- 5: ask for the noise ------------------------------------------------------------------------


def noise_loss(network, x0):
    t = torch.randint(COSINE.T, (len(x0),))
    x_t, noise = add_noise(x0, t, COSINE)
    return F.mse_loss(network(x_t, t), noise)


def experiment_5() -> Rows:
    network, _ = train(noise_loss)
    rows = {"as it comes": False, "clip_x0=True": True}
    for name, clip in rows.items():
        rows[name] = sample(network, NOISE, COSINE, CALLS, eta=0, clip_x0=clip)
    return print_tints(rows)


# ---- 6: fresh noise, and how many steps ----------------------------------------------------------


def draw_cats(predict_noise, eta=1.0, steps=None, sample=sample) -> Tensor:
    """Ten cats from the ten noise images that every experiment starts with."""
    generator = torch.Generator().manual_seed(100)
    options = {"clip_x0": True, "generator": generator}
    return sample(predict_noise, NOISE, COSINE, steps or CALLS, eta, **options)


def experiment_6() -> Rows:
    network, _ = train(noise_loss)
    ways = [(steps, eta) for steps in (5, CALLS, 5 * CALLS) for eta in (0, 1)]
    rows = {f"{steps} steps, eta {eta}": draw_cats(network, eta, steps) for steps, eta in ways}
    return print_tints(rows)


# ---- 7: v ----------------------------------------------------------------------------------------


def v_loss(network, x0):
    t = torch.randint(COSINE.T, (len(x0),))
    x_t, noise = add_noise(x0, t, COSINE)
    return F.mse_loss(noise_from_v(network, COSINE)(x_t, t), noise)


def experiment_7() -> Rows:
    networks = {"noise": train(noise_loss)[0], "v": noise_from_v(train(v_loss)[0], COSINE)}
    x0 = cats()[:256]
    t = torch.full((len(x0),), 999)
    x_t, noise = add_noise(x0, t, COSINE, randn_like(x0, torch.Generator().manual_seed(100)))
    for name, network in networks.items():
        print(f"error at t = 999, {name}: {F.mse_loss(network(x_t, t), noise):.7f}")
    ways = [(eta, name) for eta in (0, 1) for name in networks]
    return print_tints({f"{name}, eta {eta}": draw_cats(networks[name], eta) for eta, name in ways})


# ---- 8: averaged weights -------------------------------------------------------------------------


def experiment_8() -> Rows:
    last, ema = (noise_from_v(network, COSINE) for network in train(v_loss))
    networks = {"last weights": last, "EMA": ema}
    ways = [(eta, name) for eta in (0, 1) for name in networks]
    return print_tints({f"{name}, eta {eta}": draw_cats(networks[name], eta) for eta, name in ways})


# ---- broken on purpose ---------------------------------------------------------------------------

BUGS = {  # name: (file, the right code, the wrong code, the tests that then fail)
    "stops one step early": (
        "processes.py",
        "for i in range(steps, -1, -1)",
        "for i in range(steps, 0, -1)",
        "test_processes.py",
    ),
    "noise in the last step": (
        "processes.py",
        "eta * math.sqrt((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev))",
        "eta * math.sqrt(1 - ab / ab_prev)",
        "test_processes.py",
    ),
    "starts too late": (
        "processes.py",
        "round(T * i / steps) - 1 for i in range(steps, -1, -1)",
        "[round(T * i / steps) for i in range(steps - 1, -1, -1)] + [-1]",
        "test_processes.py",
    ),
    "no roots": (
        "processes.py",
        "alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise",
        "alpha_bar * x0 + (1 - alpha_bar) * noise, noise",
        "test_processes.py",
    ),
    "attention over the batch": (
        "unet.py",
        "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(*(y.transpose(0, 2) for y in (q, k, v))).transpose(0, 2)",
        "test_unet.py",
    ),
    "attention of each pixel to itself": (
        "unet.py",
        "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)",
        "test_unet.py",
    ),
    "images in [0, 1]": (
        "toolbox/data.py",
        "images.float() / 127.5 - 1",
        "images.float() / 255",
        "test_data.py",
    ),
    "t is never 0": (
        "train.py",
        "run.timesteps(schedule.T)",
        "1 + run.timesteps(schedule.T - 1)",
        "test_train.py",
    ),
    "an EMA that is too young": (
        "train.py",
        "min(0.9999, (1 + step) / (10 + step))",
        "0.9999",
        "test_train.py",
    ),
    "resumed without the optimizers": (
        "toolbox/run.py",
        "optimizer.load_state_dict(state)",
        "pass",
        "test_train.py",
    ),
}


@functools.cache
def broken(bug: str) -> types.ModuleType:
    """The file with that one line changed, as a module of its own."""
    file, line, instead, _ = BUGS[bug]
    module = types.ModuleType(bug)
    exec((ROOT / file).read_text("utf-8").replace(line, instead), module.__dict__)
    return module


def v_loss_without_roots(network, x0):
    t = torch.randint(COSINE.T, (len(x0),))
    x_t, noise = broken("no roots").add_noise(x0, t, COSINE)
    return F.mse_loss(noise_from_v(network, COSINE)(x_t, t), noise)


@functools.cache
def cats_from_0_to_1() -> Tensor:
    return (cats() + 1) / 2


def experiment_bugs() -> Rows:
    _, ema = train(v_loss)
    rows = {"right": draw_cats(noise_from_v(ema, COSINE))}
    for bug in ("stops one step early", "noise in the last step", "starts too late"):
        rows[bug] = draw_cats(noise_from_v(ema, COSINE), sample=broken(bug).sample)
    rows["v taken for the noise"] = draw_cats(ema)
    for name, training in {
        "no roots": train(v_loss_without_roots),
        "images in [0, 1]": train(v_loss, images=cats_from_0_to_1),
        "32 groups": train(v_loss, groups=32),
    }.items():
        rows[name] = draw_cats(noise_from_v(training[1], COSINE))
    network = broken("attention over the batch").UNet(**ema.config).requires_grad_(False)
    network.load_state_dict(ema.state_dict())  # the right weights; only the sampling is wrong
    rows["attention over the batch"] = draw_cats(noise_from_v(network, COSINE))
    for name, row in rows.items():
        distance = (row - rows["right"]).square().mean().sqrt()
        print(f"{name:26} {distance:.3f} from the right ones (RMS)")
    return rows


# ---- a cat of your own ---------------------------------------------------------------------------


def experiment_own() -> Rows:
    """50 images of a cat that no model has seen: an orange tabby, its colour channels swapped."""
    images = draw(50, 32, seed=1, fur="orange", pattern="tabby", eyes="green")[0][:, [1, 2, 0]]
    for i, image in enumerate(images):
        save_image(to_image(image), OUT / f"own/{i:02}.png")
    return {f"{i} to {i + COLUMNS - 1}": images[i : i + COLUMNS] for i in range(0, 50, COLUMNS)}


# ---- the pretrained model, measured --------------------------------------------------------------

CALLS_TRIED = (4, 6, 10, 20, 40)
SAMPLES = 256


@torch.no_grad()
def experiment_loss() -> None:
    """Where the loss comes from, by time step: of the model `cats` and the best linear denoiser."""
    network, schedule, config = load_model("cats")
    predict_noise = predict_noise_of(network, schedule, config)
    data, held_out = (load_data("cats", held_out=part) for part in (False, True))
    x0 = from_uint8(evenly_spaced(held_out.images, 128))
    t, generator = torch.arange(0, schedule.T, 10), torch.Generator().manual_seed(0)
    linear, errors = LinearDenoiser(data.images).errors(held_out.images, schedule.alpha_bar[t]), []
    for level in tqdm(t):
        level = level.expand(len(x0))
        x_t, noise = add_noise(x0, level, schedule, randn_like(x0, generator))
        errors.append(F.mse_loss(predict_noise(x_t, level), noise))
    errors = torch.stack(errors)
    for name, error in {"cats": errors, "linear": linear}.items():
        early, late = (
            100 * error[t < 100].sum() / error.sum(),
            100 * error[t >= 900].sum() / error.sum(),
        )
        print(
            f"{name:8} {error.mean():.4f}: {early:.0f} % from t < 100, {late:.1f} % from t >= 900"
        )
        print(
            "        ", *(f"t = {k}: {error[t == k].item():.4f}" for k in (0, 100, 500, 900, 970))
        )


def experiment_steps() -> plt.Figure:
    """How few network calls are enough, with which solver? 15 minutes on one core."""
    network, schedule, config = load_model("cats")
    predict_noise = predict_noise_of(network, schedule, config)
    data, held_out = (load_data("cats", held_out=part) for part in (False, True))
    classifier = feature_net(data)
    judge = Judge(classifier, data, held_out)
    real = classifier.extract_features(split(data.images, SAMPLES)[1])
    shape = data.images.shape[1:]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    print("| calls | eta | order | clean | confident in all | KID x 1000 |\n" + "|---" * 6 + "|")
    for order, eta in itertools.product((1, 2), (1.0, 0.0)):
        name = f"eta {eta:.0f}, " + ("even strides" if order == 1 else "order 2, snr_pairs")
        clean, kids = [], []
        for steps in CALLS_TRIED:
            pairs = timestep_pairs(schedule.T, steps) if order == 1 else snr_pairs(schedule, steps)
            options = {"timesteps": pairs, "eta": eta, "order": order, "device": "cpu"}
            images = generate(predict_noise, shape, range(SAMPLES), schedule=schedule, **options)
            features = classifier.extract_features(images)
            confident = torch.stack([*judge.confident(features).values()]).all(0)
            clean.append(100 * judge.clean(features).float().mean().item())
            kids.append([1000 * x for x in jackknife(kernel_distance, features, real)])
            sure, kid = 100 * confident.float().mean(), "{:.0f} +- {:.0f}".format(*kids[-1])
            row = f"{steps} | {eta:.0f} | {order} | {clean[-1]:.1f} % | {sure:.0f} % | {kid}"
            print(f"| {row} |", flush=True)
        left.plot(CALLS_TRIED, clean, marker="o", label=name)
        right.errorbar(CALLS_TRIED, *zip(*kids, strict=True), marker="o", capsize=3, label=name)
    left.set(ylabel="clean samples, %")
    right.set(ylabel="KID x 1000, our features", ylim=(0, None))
    for panel in (left, right):
        panel.set(xlabel="network calls", xscale="log")
        panel.set_xticks(CALLS_TRIED, CALLS_TRIED)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def experiment_texture() -> None:
    """How much fine texture do strides lose? For the best network of normal data, in seconds."""
    schedule = NoiseSchedule.sigmoid()
    spread = torch.tensor([0.02, 0.05, 0.1, 0.2], dtype=torch.float64)  # standard deviations of x0

    def predict_noise(x: Tensor, t: Tensor) -> Tensor:
        """Of each column by itself: math.md (13)."""
        alpha_bar = schedule.alpha_bar_at(t, x)
        return (1 - alpha_bar).sqrt() * x / (alpha_bar * spread**2 + 1 - alpha_bar)

    print("| calls | eta | order |", " | ".join(f"{x:g}" for x in spread), "|\n" + "|---" * 7 + "|")
    for order, eta, steps in ((1, 1, 40), (1, 1, 120), (1, 0, 40), (2, 1, 40), (2, 0, 40)):
        pairs = timestep_pairs(schedule.T, steps) if order == 1 else snr_pairs(schedule, steps)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(50_000, len(spread), generator=generator, dtype=torch.float64)
        options = {"eta": eta, "timesteps": pairs, "order": order, "generator": generator}
        x0 = sample(predict_noise, x, schedule, **options)
        kept = " | ".join(f"{100 * share:.0f} %" for share in x0.std(0) / spread)
        print(f"| {steps} | {eta} | {order} | {kept} |")


def labelled(rows: Rows) -> Image.Image:
    """One image of all rows, with each row's name to its left."""
    images = grid(torch.cat([*rows.values()]), COLUMNS)
    canvas = Image.new("RGB", (LABELS + images.width, images.height), "white")
    canvas.paste(images, (LABELS, 0))
    pen, height = ImageDraw.Draw(canvas), images.height / len(rows)
    for i, name in enumerate(rows):
        pen.text((LABELS - 8, (i + 0.5) * height), name, "black", anchor="rm", font_size=18)
    return canvas.quantize(256)


EXPERIMENTS = {
    name.removeprefix("experiment_"): value
    for name, value in globals().items()
    if name.startswith("experiment_")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="+", choices=EXPERIMENTS, help="one or more of these")
    for name in parser.parse_args().name:
        result, path = EXPERIMENTS[name](), OUT / f"lab-{name}.png"
        if isinstance(result, plt.Figure):
            save_plot(result, path)
        elif result is not None:
            save_image(labelled(result), path)
        if result is not None:
            print(f"wrote {path}")


if __name__ == "__main__":
    with user_errors():
        main()
