"""Both encoders against transformers' CLIP, the contrastive loss, and the tokenizers."""

import pytest
import torch
from oracles import V15_TEXT, error, pair, randomise, their_text_config
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from latent_ext.clip import CLIP, ImageEncoder, TextEncoder, Tokenizer, contrastive_loss
from latent_ext.weight_names import DIFFUSERS, name_pairs

SMALL = {"vocab_size": 50, "width": 24, "layers": 3, "heads": 4, "length": 12}
START_ID, END_ID = 48, 49  # of SMALL


def some_tokens():
    """Four texts of different lengths, START ... END, padded with END."""
    tokens = torch.randint(0, 48, (4, 12), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = START_ID
    for row, length in zip(tokens, (1, 4, 9, 11), strict=True):
        row[length:] = END_ID
    return tokens


@pytest.mark.parametrize("config", [SMALL, SMALL | {"heads": 1, "layers": 1, "hidden": 40}])
@torch.no_grad()
def test_the_text_encoder_equals_transformers(config):
    ours, theirs = pair(TextEncoder(**config).double())
    for tokens in (some_tokens(), some_tokens()[:, :7]):
        assert error(ours(tokens), theirs(tokens).last_hidden_state) < 1e-9


@pytest.mark.slow
@torch.no_grad()
def test_the_text_encoder_equals_transformers_at_full_width():
    ours, theirs = pair(TextEncoder(**V15_TEXT))
    tokens = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    assert error(ours(tokens), theirs(tokens).last_hidden_state) < 1e-4


IMAGE_NAMES = {  # transformers'; those of its layers are as in the text encoder
    "class_token": "embeddings.class_embedding",
    "position": "embeddings.position_embedding.weight",
    "patches.weight": "embeddings.patch_embedding.weight",
    "patches.bias": "embeddings.patch_embedding.bias",
    "norm_out.weight": "post_layernorm.weight",
    "norm_out.bias": "post_layernorm.bias",
}


def clip_pair():
    """Ours and transformers'. Its images have one norm more, and no bias in their patches."""
    ours = randomise(CLIP(TextEncoder(**SMALL), ImageEncoder(3, 16, 4, 32, 2, 4), END_ID).double())
    sizes = {"hidden_size": 32, "intermediate_size": 128, "image_size": 16, "patch_size": 4}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, hidden_act="quick_gelu").to_dict()
    text = their_text_config(ours.text.config).to_dict()
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    theirs.vision_model.pre_layrnorm = torch.nn.Identity()
    theirs.vision_model.embeddings.patch_embedding = torch.nn.Conv2d(3, 32, 4, stride=4)
    names = {own: name for name, own in name_pairs("text_encoder", ours.text, DIFFUSERS)}
    weights = {f"text_model.{names[own]}": w for own, w in ours.text.state_dict().items()}
    names |= IMAGE_NAMES
    weights |= {f"vision_model.{names[own]}": w for own, w in ours.image.state_dict().items()}
    weights["vision_model.embeddings.class_embedding"] = ours.image.class_token.flatten()
    weights["text_projection.weight"] = ours.text_projection.weight
    weights["visual_projection.weight"] = ours.image_projection.weight
    weights["logit_scale"] = ours.logit_scale
    theirs.double().load_state_dict(weights)
    return ours, theirs.eval()


def some_images():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)


def test_vectors_logits_and_loss_equal_transformers_and_everything_learns():
    """Read at the first END (there are many), projected, of length 1; all captions differ."""
    ours, theirs = clip_pair()
    x, tokens = some_images(), some_tokens()
    with torch.no_grad():
        expected = theirs(pixel_values=x, input_ids=tokens, return_loss=True)
    assert error(ours.encode_text(tokens), expected.text_embeds) < 1e-9
    assert error(ours.encode_image(x), expected.image_embeds) < 1e-9
    assert error(ours(x, tokens), expected.logits_per_image) < 1e-9
    loss = contrastive_loss(ours(x, tokens), torch.arange(4))
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    loss.backward()
    assert all(p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize(("learned", "scale"), [(None, 1 / 0.07), (9.0, 100)])
@torch.no_grad()
def test_logits_start_as_in_the_paper_end_at_100_and_are_float32(learned, scale):
    clip = CLIP(TextEncoder(**SMALL), ImageEncoder(3, 16, 4, 32, 1, 4), END_ID)
    x, tokens = some_images().float(), some_tokens()
    if learned:
        clip.logit_scale.fill_(learned)
    with torch.autocast("cpu", torch.bfloat16):  # whose 8 bits are too coarse for logits
        logits, images, texts = clip(x, tokens), clip.encode_image(x), clip.encode_text(tokens)
    expected = scale * images.float() @ texts.float().T
    torch.testing.assert_close(logits, expected, rtol=0.01, atol=0.001)


def test_embeddings_start_small():
    torch.manual_seed(0)
    text = TextEncoder(**SMALL | {"vocab_size": 500, "length": 500})
    assert text.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert text.position_embedding.weight.std().item() == pytest.approx(0.01, rel=0.05)


CAPTIONS = ["an orange tabby cat with green eyes"]
CAPTIONS += ["a white cat with blue eyes on a pink background"]


def words(tokenizer, text):
    """START as <, END as > and unknown words as ?."""
    names = {"<|startoftext|>": "<", "<|endoftext|>": ">", "<|unknown|>": "?"}
    tokens = map(tokenizer.rules.id_to_token, tokenizer(text)[0].tolist())
    return " ".join(names.get(token, token) for token in tokens)


@pytest.mark.parametrize(
    ("text", "expected", "truncated", "unknown"),
    [
        ("", "< > > > > >", "", []),
        ("a blue cat", "< a blue cat > >", "", []),
        ("  A Blue\n\tCAT ", "< a blue cat > >", "", []),
        ("cat, Na\u00efve", "< cat ? ? > >", "", [",", "Na\u00efve"]),
        ("a white cat with", "< a white cat with >", "", []),  # just fits
        ("a white cat with eyes", "< a white cat with >", "eyes", []),
        ("a a a a  Blue, on", "< a a a a >", "Blue, on", []),  # as it was typed
    ],
)
def test_a_text_is_start_words_end_and_padding(text, expected, truncated, unknown):
    tokenizer = Tokenizer.of_words(CAPTIONS, length=6)
    assert words(tokenizer, text) == expected
    assert tokenizer.truncated(text) == truncated and tokenizer.unknown(text) == unknown


@pytest.mark.parametrize(("count", "length"), [(18, 20), (19, 21), (75, 77), (90, 77)])
def test_the_longest_caption_fits_up_to_clips_length(count, length):
    captions = ["a cat", " ".join(["very"] * count)]
    tokenizer = Tokenizer.of_words(captions)
    assert tokenizer.size == 3 + len({"a", "cat", "very"})
    assert tokenizer(captions).shape == (2, length) == (2, tokenizer.length)


def test_a_tokenizer_json_may_ask_for_truncation_and_padding_of_its_own(tmp_path):
    rules = Tokenizer.of_words(CAPTIONS).rules
    rules.enable_truncation(4)
    rules.enable_padding(length=9)
    rules.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, 8)
    text = "a white cat with blue eyes"
    assert words(tokenizer, text) == f"< {text} >"
    assert tokenizer.truncated(f"{text} on") == "on"
