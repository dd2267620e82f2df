"""The judges of the second evening: the same networks by diffusers and transformers, given the
weights of ours."""

from functools import partial

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import TextEncoder
from latent_ext.vae import VAE
from latent_ext.weight_names import DIFFUSERS, name_pairs
from unet import UNet

V15_UNET = {  # Stable Diffusion v1.5's numbers
    "in_channels": 4,
    "out_channels": 4,
    "channels": (320, 640, 1280, 1280),
    "num_res_blocks": 2,
    "attention_levels": (True, True, True, False),
    "heads": 8,
    "groups": 32,
}
V15_VAE = {
    "channels": (128, 256, 512, 512),
    "num_res_blocks": 2,
    "groups": 32,
    "scaling_factor": 0.18215,
}
V15_TEXT = {"vocab_size": 49408, "width": 768, "layers": 12, "heads": 12, "length": 77}


def their_unet(ours):
    config = ours.config
    cross = ["CrossAttn" * attends for attends in config["attention_levels"]]
    return UNet2DConditionModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=config["channels"],
        layers_per_block=config["num_res_blocks"],
        down_block_types=[f"{kind}DownBlock2D" for kind in cross],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(cross)],
        cross_attention_dim=ours.mid[0].attn.attn2.k.in_features,
        attention_head_dim=config["heads"],  # diffusers' name for the number of heads
        norm_num_groups=config["groups"],
    )


def their_vae(ours):
    config, levels = ours.config, len(ours.config["channels"])
    return AutoencoderKL(
        in_channels=config["in_channels"],
        out_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        block_out_channels=config["channels"],
        layers_per_block=config["num_res_blocks"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=config["groups"],
    )


def their_text_config(config):
    return CLIPTextConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["width"],
        intermediate_size=config["hidden"],
        num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"],
        max_position_embeddings=config["length"],
        eos_token_id=config["vocab_size"] - 1,
        hidden_act="quick_gelu",
    )


JUDGES = {  # of our networks: the part of a pipeline that each is, and theirs
    UNet: ("unet", their_unet),
    VAE: ("vae", their_vae),
    TextEncoder: ("text_encoder", lambda ours: CLIPTextModel(their_text_config(ours.config))),
}


def randomise(network, seed=0):
    """Random numbers everywhere: norms at their initial 1 and 0 would hide a swapped pair."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim < 2:
                parameter.mul_(0.2).add_(0.5)
            else:
                parameter.div_(parameter[0].numel() ** 0.5)
    return network


def cross_unet(context_width, **config):
    return UNet(**config, attention_block=partial(SpatialTransformer, context_width=context_width))


def pair(ours):
    """Ours with random weights, and theirs, which shares them."""
    part, make = JUDGES[type(ours)]
    theirs, weights = make(ours), randomise(ours).state_dict()
    # transformers 4 has all of its text encoder in a `text_model`, transformers 5 has not
    prefix = "text_model." if hasattr(theirs, "text_model") else ""
    names = name_pairs(part, ours, DIFFUSERS)
    theirs.load_state_dict({prefix + name: weights[own] for name, own in names}, assign=True)
    return ours, theirs.eval()


def error(got, expected):
    """The largest difference, in units of the largest number."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
