"""The judges of the second evening: the same networks by diffusers and transformers, with the weights of ours."""

import re

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

V15_UNET = {  # Stable Diffusion v1.5's own numbers
    "in_channels": 4,
    "out_channels": 4,
    "widths": (320, 640, 1280, 1280),
    "blocks": 2,
    "attention": (True, True, True, False),
    "heads": 8,
    "groups": 32,
    "context_width": 768,
}
V15_VAE = {"widths": (128, 256, 512, 512), "blocks": 2, "groups": 32, "scale": 0.18215}
V15_TEXT = {"vocabulary": 49408, "width": 768, "layers": 12, "heads": 12, "length": 77}


def their_unet(config):
    attention = config["attention"]
    return UNet2DConditionModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=tuple(config["widths"]),
        layers_per_block=config["blocks"],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        cross_attention_dim=config["context_width"],
        attention_head_dim=config["heads"],  # diffusers' name for the number of heads
        norm_num_groups=config["groups"],
    )


def their_vae(config):
    levels = len(config["widths"])
    return AutoencoderKL(
        in_channels=config["channels"],
        out_channels=config["channels"],
        latent_channels=config["latent_channels"],
        block_out_channels=tuple(config["widths"]),
        layers_per_block=config["blocks"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=config["groups"],
    )


def their_text_config(config):
    return CLIPTextConfig(
        vocab_size=config["vocabulary"],
        hidden_size=config["width"],
        intermediate_size=config["hidden"],
        num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"],
        max_position_embeddings=config["length"],
        projection_dim=config["width"],
        bos_token_id=config["vocabulary"] - 2,
        eos_token_id=config["vocabulary"] - 1,
        hidden_act="quick_gelu",
        attn_implementation="sdpa",
    )


def their_text_encoder(config):
    return CLIPTextModel(their_text_config(config))


RES = {"time": "time_emb_proj", "skip": "conv_shortcut"}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
TRANSFORMER = {
    f"attn{i}.{ours}": f"transformer_blocks.0.attn{i}.{theirs}" for i in (1, 2) for ours, theirs in ATTENTION.items()
}
TRANSFORMER |= {f"norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)}
TRANSFORMER |= {"ff.hidden": "transformer_blocks.0.ff.net.0.proj", "ff.out": "transformer_blocks.0.ff.net.2"}
ENDS = {  # what stands beside the lists down, mid, up
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "norm": "conv_norm_out",
    "conv": "conv_out",
    "first": "conv_in",
    "quant": "quant_conv",
    "post_quant": "post_quant_conv",
}


def renamed(name, rules):
    """name.weight -> rules[name].weight; a name without a rule stays."""
    stem, dot, last = name.rpartition(".")
    return rules.get(stem, stem) + dot + last


def their_name(name, blocks, attention):
    """A U-Net's or a VAE's: up.3.res.time.weight -> up_blocks.1.resnets.0.time_emb_proj.weight, with two blocks a level.

    attention: TRANSFORMER in the U-Net, ATTENTION with its norm in the VAE.
    """
    half = re.match(r"(encoder|decoder)\.", name)
    prefix, name = (half[0], name[half.end() :]) if half else ("", name)
    found = re.match(r"(down|mid|up)\.(\d+)\.(res|attn|conv)\.(.*)", name)
    if not found:
        return prefix + renamed(name, ENDS)
    part, k, kind, rest = found[1], int(found[2]), found[3], found[4]
    per_level = blocks + 1  # down: the blocks and what halves; up: one block more
    level, j = divmod(k - 1 if part == "down" else k, per_level)
    where = "mid_block" if part == "mid" else f"{part}_blocks.{level}"
    j = 0 if (part, kind) == ("mid", "attn") else k if part == "mid" else j
    if kind == "res":
        return f"{prefix}{where}.resnets.{j}.{renamed(rest, RES)}"
    if kind == "attn":
        return f"{prefix}{where}.attentions.{j}.{renamed(rest, attention)}"
    if (part, k) == ("down", 0):
        return f"{prefix}conv_in.{rest}"
    return f"{prefix}{where}.{'down' if part == 'down' else 'up'}samplers.0.conv.{rest.removeprefix('1.')}"


LAYER = {"norm1": "layer_norm1", "norm2": "layer_norm2", "hidden": "mlp.fc1", "back": "mlp.fc2"}
LAYER |= {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"}
TEXT = {"token": "embeddings.token_embedding", "position": "embeddings.position_embedding", "norm": "final_layer_norm"}


def their_layer_name(name):
    """layers.0.norm1.bias -> encoder.layers.0.layer_norm1.bias, in the text tower and in the image tower."""
    _, k, rest = name.split(".", 2)
    return f"encoder.layers.{k}.{renamed(rest, LAYER)}"


def their_text_name(name):
    return their_layer_name(name) if name.startswith("layers.") else renamed(name, TEXT)


def randomise(network, seed=0):
    """Random numbers for every parameter: with norms at their initial 1 and 0, a swapped pair of them would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim < 2:
                parameter.mul_(0.2).add_(0.5)
            else:
                parameter.div_(parameter[0].numel() ** 0.5)
    return network


def same_weights(ours, theirs, name):
    """Theirs get copies of ours, or ours themselves if they have none; strictly: nothing is missing, nothing is left over."""
    empty = next(theirs.parameters()).is_meta
    weights = {name(key): w if empty else w.clone() for key, w in ours.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)


def unet_pair(ours):
    """Ours with random weights, and diffusers' with the same ones."""
    theirs = their_unet(ours.config).eval()
    same_weights(randomise(ours), theirs, lambda name: their_name(name, ours.config["blocks"], TRANSFORMER))
    return ours, theirs


def vae_pair(ours):
    theirs = their_vae(ours.config).eval()
    attention = ATTENTION | {"norm": "group_norm"}
    same_weights(randomise(ours), theirs, lambda name: their_name(name, ours.config["blocks"], attention))
    return ours, theirs


def text_pair(ours):
    theirs = their_text_encoder(ours.config).eval()
    # transformers 4 put everything of this model into a `text_model`, transformers 5 does not
    prefix = "text_model." if hasattr(theirs, "text_model") else ""
    same_weights(randomise(ours), theirs, lambda name: prefix + their_text_name(name))
    return ours, theirs


def error(got, expected):
    """The largest difference, in units of the largest number."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
