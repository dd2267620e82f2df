"""The experiments of docs/lab.md: `python docs/lab.py 1` trains the first one, and draws runs/lab/lab-1.png.

Cats of 16x16 pixels, a small U-Net, one core. Several in one command (`python docs/lab.py 5 6 7 8`) share their trainings.
"""

import copy
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from processes import NoiseSchedule, add_noise, randn, sample, v_to_noise  # noqa: E402
from toolbox.cats import draw  # noqa: E402
from toolbox.muon import Muon  # noqa: E402
from toolbox.pictures import save, to_image  # noqa: E402
from unet import UNet  # noqa: E402

STEPS, BATCH = 400, 32  # of each training
CALLS = 40  # of the network, for each sample
OUT = Path("runs/lab")
COSINE, LINEAR = NoiseSchedule.cosine(), NoiseSchedule.linear()
PICTURES = 10  # in a row
NOISE = randn((PICTURES, 3, 16, 16), [torch.Generator().manual_seed(i) for i in range(PICTURES)])


@functools.cache
def cats() -> Tensor:
    return draw(4096, 16)[0]


@functools.cache
def learn(loss: Callable, pictures: Callable[[], Tensor] = cats, groups: int = 1) -> tuple[UNet, UNet]:
    """Train a small U-Net, so that loss(network, x0) gets small. Returns its last weights, and their average."""
    torch.manual_seed(0)
    network = UNet(widths=(32, 64, 64), attention=(False, False, True), groups=groups)
    averaged = copy.deepcopy(network).requires_grad_(False)
    matrices, vectors = ([w for w in network.parameters() if (w.ndim > 1) == many] for many in (True, False))
    optimizers = [Muon(matrices, lr=2e-3), torch.optim.AdamW(vectors, lr=2e-3, betas=(0.9, 0.99))]
    history = []
    for k in (bar := tqdm(range(1, STEPS + 1), desc=loss.__name__)):
        x0 = pictures()[torch.randint(len(pictures()), (BATCH,))]
        value = loss(network, x0)
        value.backward()
        for optimizer in optimizers:  # the learning rate never falls: experiment 8 shows what that costs
            optimizer.step()
            optimizer.zero_grad()
        torch._foreach_lerp_(list(averaged.parameters()), [w.detach() for w in network.parameters()], 9 / (10 + k))
        history.append(value.item())
        bar.set_postfix(loss=f"{sum(history[-50:]) / len(history[-50:]):.4f}")
    return network.requires_grad_(False), averaged


def colours(rows: list[Tensor]) -> Tensor:
    """The rows as they are, and in words how far their mean colour is off that of the data: a tint."""
    for i, row in enumerate(rows, start=1):
        off = row.clamp(-1, 1).mean((0, 2, 3)) - cats().mean((0, 2, 3))
        print(f"row {i}: " + ", ".join(f"{name} {x:+.2f}" for name, x in zip(("red", "green", "blue"), off, strict=True)))
    return torch.cat(rows)


# ---- 1: noise in, cat out ---------------------------------------------------------------------------------------------


def leap(network, x0):
    noise = torch.randn_like(x0)
    return F.mse_loss(network(noise, untold(x0)), x0)


def untold(x: Tensor) -> Tensor:
    """The U-Net wants to hear a time step; this one tells it nothing."""
    return torch.zeros(len(x))


def experiment_1():
    network, _ = learn(leap)
    return network(NOISE, untold(NOISE))


# ---- 2: an easier question, and its answer asked again ------------------------------------------------------------------


def blind(network, x0):
    s = torch.rand(len(x0), 1, 1, 1)  # the share of noise
    x = (1 - s) * x0 + s * torch.randn_like(x0)
    return F.mse_loss(network(x, untold(x0)), x0)


def experiment_2():
    network, _ = learn(blind)
    s = torch.linspace(0.1, 1, PICTURES).view(-1, 1, 1, 1)
    x = (1 - s) * cats()[7] + s * NOISE
    again = [NOISE]
    for _ in range(PICTURES - 1):
        again.append(network(again[-1], untold(NOISE)))  # its answer is the next question
    return torch.cat([x, network(x, untold(x)), *(answer[:1] for answer in again), again[-1]])


# ---- 3: only a little way towards the answer ----------------------------------------------------------------------------


def told(network, x0):
    s = torch.rand(len(x0), 1, 1, 1)
    x = (1 - s) * x0 + s * torch.randn_like(x0)
    return F.mse_loss(network(x, 1000 * s.flatten()), x0)


def walk(network, x, steps, tell):
    for left in range(steps, 0, -1):
        s = torch.full((len(x),), left / steps)  # it was pure noise, s = 1; it becomes a picture, s = 0
        guess = network(x, 1000 * s if tell else untold(x))
        x = x + (guess - x) / left  # the last time, all of the way
    return x


def experiment_3():
    rows = [walk(learn(blind)[0], NOISE, CALLS, tell=False)]
    return colours(rows + [walk(learn(told)[0], NOISE, steps, tell=True) for steps in (2, 5, CALLS)])


# ---- 4: how to mix ------------------------------------------------------------------------------------------------------


def experiment_4():
    t = torch.linspace(0, 999, PICTURES).long()
    x0 = cats()[7].expand(PICTURES, -1, -1, -1)
    s = (t / 999).view(-1, 1, 1, 1)
    rows = {"without roots": (1 - s) * x0 + s * NOISE}
    rows |= {schedule.name: add_noise(x0, t, schedule, NOISE)[0] for schedule in (COSINE, LINEAR)}
    for name, row in rows.items():
        print(f"{name:14} standard deviation", " ".join(f"{x.std():.2f}" for x in row))
    return torch.cat([*rows.values()]) / 2  # or everything beyond -1 .. 1 would be cut off


# ---- 5: ask for the noise -----------------------------------------------------------------------------------------------


def noise(network, x0):
    t = torch.randint(COSINE.T, (len(x0),))
    x_t, noise = add_noise(x0, t, COSINE)
    return F.mse_loss(network(x_t, t), noise)


def experiment_5():
    network, _ = learn(noise)
    return colours([sample(network, NOISE, COSINE, CALLS, eta=0, clip=clip) for clip in (False, True)])


# ---- 6: fresh noise, and how many steps ---------------------------------------------------------------------------------


def experiment_6():
    network, _ = learn(noise)
    rows = [(5, 0), (5, 1), (CALLS, 0), (CALLS, 1), (5 * CALLS, 0), (5 * CALLS, 1)]
    return colours([sample(network, NOISE, COSINE, steps, eta, clip=True, generator=fresh()) for steps, eta in rows])


def fresh() -> torch.Generator:
    return torch.Generator().manual_seed(100)


# ---- 7: v ---------------------------------------------------------------------------------------------------------------


def v(network, x0):
    t = torch.randint(COSINE.T, (len(x0),))
    x_t, noise = add_noise(x0, t, COSINE)
    return F.mse_loss(v_to_noise(network, COSINE)(x_t, t), noise)


def experiment_7():
    networks = learn(noise)[0], v_to_noise(learn(v)[0], COSINE)
    x0 = cats()[:256]
    t = torch.full((len(x0),), 999)
    x_t, truth = add_noise(x0, t, COSINE, torch.randn(x0.shape, generator=fresh()))
    print("error at t = 999:", *(f"{F.mse_loss(network(x_t, t), truth):.7f}" for network in networks))
    rows = [(network, eta) for eta in (0, 1) for network in networks]
    return colours([sample(network, NOISE, COSINE, CALLS, eta, clip=True, generator=fresh()) for network, eta in rows])


# ---- 8: averaged weights ------------------------------------------------------------------------------------------------


def experiment_8():
    networks = [v_to_noise(network, COSINE) for network in learn(v)]
    rows = [(network, eta) for eta in (0, 1) for network in networks]
    return colours([sample(network, NOISE, COSINE, CALLS, eta, clip=True, generator=fresh()) for network, eta in rows])


# ---- broken on purpose --------------------------------------------------------------------------------------------------

BUGS = {  # file, a line of it, what stands there instead, and a test that fails then
    "stops one step early": (
        "processes.py",
        "list(zip(walk, [*walk, -1][1:], strict=True))",
        "list(zip(walk, walk[1:]))",
        "test_one_single_picture_is_met_exactly",
    ),
    "noise in the last step": (
        "processes.py",
        "eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))",
        "eta * math.sqrt(1 - a / a_prev)",
        "test_one_single_picture_is_met_exactly",
    ),
    "starts too late": (
        "processes.py",
        "round(T * i / steps) - 1 for i in range(steps, 0, -1)",
        "round(T * i / steps) for i in range(steps - 1, -1, -1)",
        "test_default_walks_from_the_last_index_to_the_first",
    ),
    "no roots": (
        "processes.py",
        "alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, noise",
        "alpha_bar * x0 + (1 - alpha_bar) * noise, noise",
        "test_add_noise_is_what_many_small_steps_do",
    ),
    "attention over the batch": (
        "unet.py",
        "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(*(z.transpose(0, 2) for z in (q, k, v))).transpose(0, 2)",
        "test_every_pixel_reaches_every_pixel_and_no_other_image",
    ),
    "attention of each pixel to itself": (
        "unet.py",
        "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2)",
        "test_every_pixel_reaches_every_pixel_and_no_other_image",
    ),
    "pictures in [0, 1]": (
        "toolbox/data.py",
        "images.float() / 127.5 - 1",
        "images.float() / 255",
        "test_bytes_and_back",
    ),
    "t is never 0": (
        "toolbox/run.py",
        "torch.randint(high, (self.batch,)",
        "torch.randint(1, high, (self.batch,)",
        "test_time_steps_pictures_and_noise_are_uniform_and_complete",
    ),
    "an average that is too young": (
        "toolbox/run.py",
        "min(0.9999, (1 + self.k) / (10 + self.k))",
        "0.9999",
        "test_the_average_is_of_weights_only_and_remembers_a_ninth_of_the_run",
    ),
    "resumed without the optimizers": (
        "toolbox/run.py",
        "optimizer.load_state_dict(state)",
        "pass",
        "test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint",
    ),
}


@functools.cache
def broken(bug: str) -> types.ModuleType:
    """The file with that one line changed, as a module of its own."""
    file, line, instead, _ = BUGS[bug]
    module = types.ModuleType(bug)
    exec((ROOT / file).read_text(encoding="utf8").replace(line, instead), module.__dict__)
    return module


def v_without_roots(network, x0):
    t = torch.randint(COSINE.T, (len(x0),))
    x_t, noise = broken("no roots").add_noise(x0, t, COSINE)
    return F.mse_loss(v_to_noise(network, COSINE)(x_t, t), noise)


@functools.cache
def cats_from_0_to_1() -> Tensor:
    return (cats() + 1) / 2


def experiment_bugs():
    options = {"steps": CALLS, "clip": True, "generator": None}

    def row(network, sample=sample):
        return sample(network, NOISE, COSINE, **options | {"generator": fresh()})

    right = v_to_noise(learn(v)[1], COSINE)
    rows = {"right": row(right)}
    for bug in ("stops one step early", "noise in the last step", "starts too late"):
        rows[bug] = row(right, broken(bug).sample)
    rows["v taken for the noise"] = row(learn(v)[1])
    rows["no roots"] = row(v_to_noise(learn(v_without_roots)[1], COSINE))
    rows["pictures in [0, 1]"] = row(v_to_noise(learn(v, pictures=cats_from_0_to_1)[1], COSINE))
    rows["32 groups"] = row(v_to_noise(learn(v, groups=32)[1], COSINE))
    network = broken("attention over the batch").UNet(**learn(v)[1].config).requires_grad_(False)
    network.load_state_dict(learn(v)[1].state_dict())  # the right weights; only the drawing is wrong
    rows["attention over the batch"] = row(v_to_noise(network, COSINE))
    for name, pictures in rows.items():
        print(f"{name:26} {(pictures - rows['right']).square().mean().sqrt():.3f} from the right ones")
    return torch.cat([*rows.values()])


# ---- a cat of your own --------------------------------------------------------------------------------------------------


def experiment_own():
    """50 pictures of one cat that no model has seen: an orange tabby with exchanged colours is violet."""
    pictures = draw(50, 32, seed=1, fur="orange", pattern="tabby", eyes="green")[0][:, [1, 2, 0]]
    for i, picture in enumerate(pictures):
        save(to_image(picture), OUT / f"own/{i:02}.png")
    return pictures


def main() -> None:
    experiments = {name.removeprefix("experiment_"): make for name, make in globals().items() if name.startswith("experiment_")}
    wanted = sys.argv[1:]
    if not wanted or set(wanted) - set(experiments):
        sys.exit(f"python docs/lab.py NAME, with a NAME of: {' '.join(experiments)}; several, too")
    for name in wanted:
        pictures = experiments[name]()
        pictures = F.interpolate(pictures.clamp(-1, 1), scale_factor=64 // pictures.shape[-1])
        save(to_image(make_grid(pictures, nrow=PICTURES, pad_value=1.0)).quantize(256), OUT / f"lab-{name}.png")
        print(f"wrote {OUT / f'lab-{name}.png'}")


if __name__ == "__main__":
    main()
