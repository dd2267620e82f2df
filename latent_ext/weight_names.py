"""The names under which diffusers and CompVis store the weights of our networks.

The rules are pairs in a table, weight_names.txt. Reading and writing use it in the same way: they
walk through the weights of one of our networks and ask for the other name.
"""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from torch import nn

DIFFUSERS, COMPVIS = 0, -1  # columns of the table, after our own
TABLE = Path(__file__).with_name("weight_names.txt")
LAYER = re.compile(r"(?:(.+\.(res|attn))\.)?(.+)\.(weight|bias)")  # block, its kind, layer in it


def name_pairs(part: str, network: nn.Module, layout: int) -> Iterator[tuple[str, str]]:
    """For each weight of a network (the unet, vae or text_encoder) its name in that layout, and
    its name here."""
    names = layer_names(part, network.config, layout)
    for ours in network.state_dict():
        block, kind, layer, parameter = LAYER.fullmatch(ours).groups()
        theirs = names[layer] if block is None else f"{names[block]}.{names[f'{kind}.{layer}']}"
        yield f"{theirs}.{parameter}", ours


def layer_names(part: str, config: dict, layout: int) -> dict[str, str]:
    """Our name -> theirs, for every layer that such a network may have."""
    text = re.sub("#.*", "", TABLE.read_text("utf-8"))
    section = text.partition(f"[{part}]")[2].partition("[")[0]
    halves = ("", "encoder.", "decoder.") if part == "vae" else ("",)
    names = {}
    for numbers, n, x, half in product(block_numbers(config), (1, 2, 3), "qkv", halves):
        rows = map(str.split, section.format(**numbers, n=n, x=x).splitlines())
        for ours, *theirs in filter(None, rows):
            names[half + ours] = half + theirs[layout]
    return names


def block_numbers(config: dict) -> Iterator[dict[str, int]]:
    """What the braces of the table stand for, for each block of a list."""
    if "layers" in config:
        yield from ({"i": i} for i in range(config["layers"]))
        return
    levels, per_level = len(config["channels"]), config["num_res_blocks"] + 1
    attention = config.get("attention_levels", [False] * levels)
    for i in range(levels * per_level):
        level, j = divmod(i, per_level)
        size = levels - 1 - level
        last = 1 + attention[size]
        yield {"i": i, "next": i + 1, "level": level, "j": j, "size": size, "last": last}
