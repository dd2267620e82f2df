"""The figures of the second evening's README: `python -m docs.latent_figures` draws them.

Any model of drawn cats will do. `latent_ext.train clip` draws similarity.png, and the README's
command draws digits.png.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from latent_ext.attention import Attention, SpatialTransformer
from latent_ext.generate import default_model, load_pipeline
from latent_ext.pipeline import Pipeline, image_to_image, inpaint, text_to_image
from toolbox.data import from_uint8, load_data
from toolbox.device import pick_device
from toolbox.files import user_errors
from toolbox.images import save_plot, to_image
from toolbox.seeds import generators

PROMPTS = [
    "an orange tabby cat with green eyes on a blue background",
    "a black tuxedo cat with yellow eyes on a pink background",
    "a white patched cat with blue eyes on a green background",
    "a grey tabby cat with yellow eyes on a yellow background",
    "a black cat with green eyes on a yellow background",
    "an orange tuxedo cat with blue eyes on a green background",
    "a grey patched cat with green eyes on a pink background",
    "a white cat with blue eyes on a pink background",
    "a black patched cat",
    "an orange cat with blue eyes",
    "a grey tuxedo cat on a blue background",
    "a white tabby cat on a green background",
]
CAT = "a black patched cat with yellow eyes on a blue background"
HEADS = ["a black cat", "a grey cat", "a white cat", "an orange tabby cat"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="as for latent_ext.generate")
    add("--out", type=Path, default=Path("latent_ext/pictures"), help="folder to write into")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    args = parser.parse_args()
    pipeline = load_pipeline(args.model or default_model(), pick_device(args.device))
    data = load_data("cats", pipeline.size, held_out=True)
    x0 = from_uint8(data.images[:8]).to(pipeline.weight.device)

    x = text_to_image(pipeline, PROMPTS, **options(12))
    panels(x.split(6), args.out / "text.png", titles=[PROMPTS[:6], PROMPTS[6:]])
    show_latents(pipeline, x0, args.out / "latents.png")
    prompt = "an orange tabby cat with green eyes on a pink background"
    words = ["orange", "tabby", "eyes", "pink"]
    show_attention(pipeline, prompt, words, args.out / "attention.png")

    scales = (0, 1, 2, 3, 5, 10)
    rows = [text_to_image(pipeline, [CAT] * 8, **options(8, scale)) for scale in scales]
    panels(rows, args.out / "guidance.png", [f"guidance {scale}" for scale in scales])

    columns, titles = [x0[:4]], ["the input"]
    for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x = image_to_image(pipeline, [CAT] * 4, x0[:4], strength=strength, **options(4))
        columns.append(x)
        titles.append(f"strength {strength}")
    panels(torch.stack(columns, dim=1), args.out / "strength.png", titles=[titles])

    image, mask = x0[1], torch.zeros_like(x0[1, :1])
    mask[:, : pipeline.size * 5 // 8] = 1  # the head
    prompts = [f"{head} with blue eyes on a pink background" for head in HEADS]
    images, masks = image.repeat(4, 1, 1, 1), mask.repeat(4, 1, 1, 1)
    row = [image, torch.maximum(image, 2 * mask - 1)]
    row += inpaint(pipeline, prompts, images, masks, **options(4))
    titles = ["the input", "white: redrawn", *prompts]
    panels([row], args.out / "inpainting.png", titles=[titles])


def options(n: int, guidance_scale: float = 3.0) -> dict:
    """How to draw n images, with the seeds 0, 1, ..."""
    return {"generator": generators(range(n)), "guidance_scale": guidance_scale, "eta": 1.0}


@torch.no_grad()
def show_latents(pipeline: Pipeline, x0: Tensor, path: Path) -> None:
    """Rows: images, each channel of their latents from minimum to maximum, reconstructions."""
    z = pipeline.vae.encode(x0)[0]
    low, high = z.amin((0, 2, 3), keepdim=True), z.amax((0, 2, 3), keepdim=True)
    grey = F.interpolate((z - low) / (high - low) * 2 - 1, scale_factor=pipeline.downsampling)
    names = ["image", *(f"channel {i}" for i in range(z.shape[1])), "decoded"]
    panels([x0, *grey.split(1, dim=1), pipeline.vae.decode(z)], path, names)


@torch.no_grad()
def show_attention(pipeline: Pipeline, prompt: str, shown: Sequence[str], path: Path) -> None:
    """Where the pixels attend to each word of `shown`, compared with all words of the prompt.

    Cross-attention of the last block, which has the highest resolution, averaged over time steps.
    Its heads differ: each word is shown by the head whose map varies most.
    """
    maps = []

    def record(module: Attention, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        q, k = module.q(inputs[0]), module.k(inputs[1])
        q, k = (rearrange(y, "b n (heads d) -> b heads n d", heads=module.heads) for y in (q, k))
        attention = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
        maps.append(attention[-1])  # guidance's conditional half: (heads, pixels, tokens)

    blocks = [block for block in pipeline.unet.modules() if isinstance(block, SpatialTransformer)]
    hook = blocks[-1].attn2.register_forward_hook(record)
    x = text_to_image(pipeline, [prompt], **options(1))
    hook.remove()
    words = prompt.split()
    attention = torch.stack(maps).mean(0)[:, :, 1 : 1 + len(words)]  # (heads, pixels, words)
    relative = attention / attention.mean(2, keepdim=True)
    row = [x[0]]
    for word in shown:
        heads = relative[:, :, words.index(word)]  # (heads, pixels)
        light = heads[heads.std(1).argmax()].view(1, 1, int(heads.shape[1] ** 0.5), -1)
        light = F.interpolate(light / light.max(), x.shape[2:])
        row.append(((x + 1) * light - 1)[0])
    panels([row], path, titles=[["the image", *shown]])


def panels(rows: Sequence, path: Path, names: Sequence[str] = (), titles: Sequence = ()) -> None:
    """Rows of images (C, H, W); names: of rows; titles: rows of titles, one above each image."""
    columns, height = max(map(len, rows)), 1.9 if titles else 1.35
    size = {"figsize": (1.4 * columns, height * len(rows)), "squeeze": False}
    figure, axes = plt.subplots(len(rows), columns, layout="constrained", **size)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            axes[y, x].imshow(to_image(image), cmap="gray")
            axes[y, x].set(xticks=[], yticks=[])
            if y < len(titles):
                axes[y, x].set_title(textwrap.fill(titles[y][x], 24), fontsize=7)
        if names:
            axes[y, 0].set_ylabel(names[y], rotation=0, ha="right", va="center")
    save_plot(figure, path, dpi=110)


if __name__ == "__main__":
    with user_errors():
        main()
