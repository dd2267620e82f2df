"""The names under which diffusers and CompVis store the weights of our networks.

The rules are in a table, weight_names.txt. Reading and writing use it in the same way: they walk
through the weights of one of our networks and look up the other name.
"""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from torch import nn

TABLE = re.sub("#.*", "", Path(__file__).with_name("weight_names.txt").read_text("utf-8"))
SECTIONS = dict(re.findall(r"\[(\w+)\]([^[]*)", TABLE))
DIFFUSERS, COMPVIS = 0, -1  # columns of the table, after our own
LAYER = re.compile(r"(?:(.+\.(res|attn))\.)?(.+)\.(\w+)")  # block, its kind, layer in it, weight


def rows(section: str) -> list[list[str]]:
    return [line.split() for line in section.splitlines() if line.strip()]


CONFIG_KEYS = {theirs: ours for ours, theirs in rows(SECTIONS["config"])}


def name_pairs(part: str, network: nn.Module, layout: int) -> Iterator[tuple[str, str]]:
    """For each weight of a network (the unet, vae or text_encoder), yield its name in that layout
    and its name here."""
    names = layer_names(part, network.config, layout)
    for ours in network.state_dict():
        block, kind, layer, parameter = LAYER.fullmatch(ours).groups()
        if block is None:
            theirs = names.get(layer, layer)  # a layer that a reader adds keeps its name
        else:
            theirs = f"{names[block]}.{names.get(f'{kind}.{layer}', layer)}"
        yield f"{theirs}.{parameter}", ours


def layer_names(part: str, config: dict, layout: int) -> dict[str, str]:
    """Our name -> theirs, for every layer that such a network may have."""
    halves = ("", "encoder.", "decoder.") if part == "vae" else ("",)
    names = {}
    for numbers, n, x, half in product(block_numbers(config), (1, 2, 3), "qkv", halves):
        for ours, *theirs in rows(SECTIONS[part].format(**numbers, n=n, x=x)):
            names[half + ours] = half + theirs[layout]
    return names


def block_numbers(config: dict) -> Iterator[dict[str, int]]:
    """For each block of a list, the numbers that replace the table's braces."""
    levels = config.get("layers") or len(config["channels"])  # a layer is a level of one block
    per_level = config.get("num_res_blocks", 0) + 1
    attention = config.get("attention_levels", [False] * levels)
    for i in range(levels * per_level):
        level, j = divmod(i, per_level)
        size = levels - 1 - level
        last = 1 + attention[size]
        yield {"i": i, "next": i + 1, "level": level, "j": j, "size": size, "last": last}
