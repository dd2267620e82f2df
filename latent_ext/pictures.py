"""The pictures of the second evening's README: `python -m latent_ext.pictures` makes them, of any model of drawn cats.

But for three: similarity.png is a picture of `latent_ext.train clip`, digits.png and objects.png of the README's commands.
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
from latent_ext.clip import CLIP, Tokenizer
from latent_ext.generate import default_model, find
from latent_ext.pipeline import Pipeline, image_to_image, inpaint, text_to_image
from toolbox.data import Data, from_bytes, load_data
from toolbox.files import errors_in_one_sentence, whole_file
from toolbox.pictures import to_image
from toolbox.run import pick_device

HOW = {"guidance": 3.0, "eta": 1.0}
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


@torch.no_grad()
def plot_similarity(
    network: CLIP, tokenizer: Tokenizer, data: Data, path: Path, n: int = 10
) -> None:
    """How well each of n pictures fits the caption of each: the cosines that CLIP has learned to make large on the diagonal."""
    captions = list(dict.fromkeys(data.captions))[:n]
    images = data.images[[data.captions.index(caption) for caption in captions]]
    device = network.sharpness.device
    cosines = (
        network.images(from_bytes(images).to(device))
        @ network.texts(tokenizer(captions).to(device)).T
    )
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    axes.imshow(cosines.T.cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu")
    for column in range(len(captions)):
        for row in range(len(captions)):
            colour = "white" if cosines[column, row].abs() > 0.7 else "black"
            axes.text(
                column,
                row,
                f"{cosines[column, row]:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
        corner = axes.inset_axes([column - 0.45, -1.55, 0.9, 0.9], transform=axes.transData)
        corner.imshow(to_image(from_bytes(images[column])))
        corner.axis("off")
    axes.set_yticks(range(len(captions)), captions)
    axes.set_xticks([])
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for latent_ext.generate")
    parser.add_argument("--out", type=Path, default=Path("latent_ext/pictures"), help="a folder")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    args = parser.parse_args()
    pipeline = find(args.model or default_model(), pick_device(args.device))
    data = load_data("cats", pipeline.size, held_out=True)
    x0 = from_bytes(data.images[:8]).to(pipeline.device)

    drawn = text_to_image(pipeline, PROMPTS, generator=seeds(len(PROMPTS)), **HOW)
    panels([*drawn.split(6)], args.out / "text.png", titles=[PROMPTS[:6], PROMPTS[6:]])
    show_latents(pipeline, x0, args.out / "latents.png")
    show_attention(
        pipeline,
        "an orange tabby cat with green eyes on a pink background",
        args.out / "attention.png",
    )

    cat = "a black patched cat with yellow eyes on a blue background"
    scales = (0, 1, 2, 3, 5, 10)
    rows = [
        text_to_image(pipeline, [cat] * 8, generator=seeds(8), **HOW | {"guidance": scale})
        for scale in scales
    ]
    panels(rows, args.out / "guidance.png", [f"guidance {scale}" for scale in scales])

    strengths = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    how = [{"strength": strength} | HOW for strength in strengths]
    made = [
        x0[:4],
        *(image_to_image(pipeline, [cat] * 4, x0[:4], generator=seeds(4), **one) for one in how),
    ]
    titles = [["the input", *(f"strength {strength}" for strength in strengths)], *[[""] * 7] * 3]
    panels([*torch.stack(made, dim=1)], args.out / "strength.png", titles=titles)

    mask = torch.zeros(1, 1, pipeline.size, pipeline.size)
    mask[..., : pipeline.size * 5 // 8, :] = 1  # the head
    heads = ["a black cat", "a grey cat", "a white cat", "an orange tabby cat"]
    heads = [f"{head} with blue eyes on a pink background" for head in heads]
    first, hole = (x.expand(len(heads), -1, -1, -1) for x in (x0[1:2], mask))
    made = inpaint(pipeline, heads, first, hole, generator=seeds(len(heads)), **HOW)
    seen = torch.where(mask.to(x0) > 0, torch.ones_like(first), first)
    panels(
        [[first[0], seen[0], *made]],
        args.out / "inpainting.png",
        titles=[["the input", "white: repainted", *heads]],
    )


def seeds(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


@torch.no_grad()
def show_latents(pipeline: Pipeline, x0: Tensor, path: Path) -> None:
    """Pictures, the channels of their latents (each in grey, from its lowest number to its highest), and what is decoded."""
    z = pipeline.vae.encode(x0)[0]
    low, high = z.amin((0, 2, 3), keepdim=True), z.amax((0, 2, 3), keepdim=True)
    grey = F.interpolate((z - low) / (high - low) * 2 - 1, scale_factor=pipeline.vae.factor)
    channels = [channel[:, None].expand(-1, 3, -1, -1) for channel in grey.unbind(1)]
    names = ["drawn", *(f"channel {i}" for i in range(len(channels))), "decoded"]
    panels([x0, *channels, pipeline.vae.decode(z)], path, names)


@torch.no_grad()
def show_attention(pipeline: Pipeline, prompt: str, path: Path) -> None:
    """Where the pixels looked at each word, beside how much they looked at words at all.

    The softmax of the cross-attentions, a mean over heads, blocks and time steps; of guidance's two calls that with the text.
    """
    seen = []

    def record(module: Attention, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        sides = module.q(inputs[0]), module.k(inputs[1])
        q, k = (
            rearrange(side, "b n (heads d) -> b heads n d", heads=module.heads) for side in sides
        )
        seen.append(
            (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3).mean(1)[-1]
        )  # (pixels, tokens)

    blocks = [
        module for module in pipeline.unet.modules() if isinstance(module, SpatialTransformer)
    ]
    hooks = [block.attn2.register_forward_hook(record) for block in blocks]
    picture = text_to_image(pipeline, [prompt], generator=seeds(1), **HOW)
    for hook in hooks:
        hook.remove()
    sharpest = max(len(maps) for maps in seen)
    maps = (
        torch.stack([maps for maps in seen if len(maps) == sharpest]).mean(0).T
    )  # (tokens, pixels)
    side = int(sharpest**0.5)
    words = prompt.split()
    maps = maps[1 : 1 + len(words)] / maps[1 : 1 + len(words)].mean(
        0
    )  # without START and what comes after the text
    columns, names = [picture[0]], ["the picture"]
    for i, word in enumerate(words):
        if word not in ("a", "an", "with", "on"):
            one = maps[i].view(1, 1, side, side)
            one = (one - one.min()) / (one.max() - one.min())
            lit = F.interpolate(one, picture.shape[2:], mode="bilinear")
            columns.append(((picture + 1) * (0.15 + 0.85 * lit) - 1)[0])
            names.append(word)
    panels([columns], path, titles=[names])


def panels(
    rows: list, path: Path, names: Sequence[str] = (), titles: Sequence[Sequence[str]] = ()
) -> None:
    """Rows of pictures (3, H, W) in [-1, 1]; names: one beside each row; titles: for each row one above each picture."""
    wide, high = max(len(row) for row in rows), 1.9 if titles else 1.35
    figure, axes = plt.subplots(
        len(rows), wide, figsize=(1.4 * wide, high * len(rows)), layout="constrained", squeeze=False
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            axes[y, x].imshow(to_image(picture))
            axes[y, x].set(xticks=[], yticks=[])
            if titles:
                axes[y, x].set_title(textwrap.fill(titles[y][x], 24), fontsize=7)
        if names:
            axes[y, 0].set_ylabel(names[y], rotation=0, ha="right", va="center")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
