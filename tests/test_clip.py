"""Both towers against transformers' CLIP with the same weights, the contrastive loss, and the tokenizer of words."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import V15_TEXT, error, randomise, renamed, text_pair, their_layer_name, their_text_config, their_text_name
from tokenizers import Tokenizer as Rules
from tokenizers import models
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from latent_ext.clip import CLIP, END, START, UNKNOWN, ImageEncoder, TextEncoder, Tokenizer, contrast
from toolbox.cats import draw

SMALL = {"vocabulary": 50, "width": 24, "layers": 3, "heads": 4, "length": 12}
END_ID = 49  # of SMALL


def make(config=SMALL):
    return text_pair(TextEncoder(**config).double())


def some_tokens():
    """Four texts of different lengths, START ... END, filled up with END."""
    tokens = torch.randint(0, 48, (4, 12), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = 48
    for row, length in zip(tokens, (1, 4, 9, 11), strict=True):
        row[length:] = END_ID
    return tokens


@torch.no_grad()
def difference(ours, theirs, tokens=None):
    tokens = some_tokens() if tokens is None else tokens
    return error(ours(tokens), theirs(tokens).last_hidden_state)


# ---- the text tower -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, SMALL | {"heads": 1, "layers": 1, "hidden": 40}], ids=["small", "one layer"])
def test_equals_transformers(config):
    ours, theirs = make(config)
    assert difference(ours, theirs) < 1e-9
    assert difference(ours, theirs, some_tokens()[:, :7]) < 1e-9  # fewer tokens


def swap(module, a, b):
    one, other = getattr(module, a), getattr(module, b)
    setattr(module, a, other), setattr(module, b, one)


def other_gelu(layer):
    def forward(x, causal):
        x = x + attention_of(layer, layer.norm1(x))
        return x + layer.back(F.gelu(layer.hidden(layer.norm2(x))))

    layer.forward = forward


def attention_of(layer, y):
    q, k, v = (to(y).unflatten(2, (layer.heads, -1)).transpose(1, 2) for to in (layer.q, layer.k, layer.v))
    return layer.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def not_causal(layer):
    forward = layer.forward
    layer.forward = lambda x, causal: forward(x, causal=False)


MISTAKES = {  # each in one place only
    "norms swapped": lambda net: swap(net.layers[1], "norm1", "norm2"),
    "eps of a norm": lambda net: setattr(net.layers[0].norm1, "eps", 1e-6),
    "eps of the last norm": lambda net: setattr(net.norm, "eps", 1e-6),
    "the last norm forgotten": lambda net: setattr(net, "norm", torch.nn.Identity()),
    "GELU in the place of quick GELU": lambda net: other_gelu(net.layers[2]),
    "not causal": lambda net: not_causal(net.layers[0]),
    "half the heads": lambda net: setattr(net.layers[1], "heads", 2),
    "queries and keys swapped": lambda net: swap(net.layers[0], "q", "k"),
    "positions from the second on": lambda net: net.position.weight.data.copy_(net.position.weight.data.roll(-1, 0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake):
    """Each mistake, put in, is far above the tolerance of 1e-9."""
    ours, theirs = make()
    MISTAKES[mistake](ours)
    assert difference(ours, theirs) > 1e-8


def test_by_its_arguments_alone_it_is_stable_diffusions():
    with torch.device("meta"):
        text = TextEncoder(**V15_TEXT)
    assert sum(p.numel() for p in text.parameters()) == 123_060_480 and len(text.state_dict()) == 196


@pytest.mark.slow
def test_equals_transformers_at_full_width():
    ours, theirs = text_pair(TextEncoder(**V15_TEXT))
    tokens = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    assert difference(ours, theirs, tokens) < 1e-4


def test_a_later_word_does_not_change_earlier_states():
    ours, _ = make()
    tokens = some_tokens()
    other = tokens.clone()
    other[:, 5] = (tokens[:, 5] + 1) % 48
    with torch.no_grad():
        changed = (ours(tokens) - ours(other)).abs().amax(2)  # (4, 12)
    assert changed[:, :5].max() == 0 and changed[:, 5:].min() > 1e-6


def test_what_fills_a_text_up_has_states_of_its_own_and_is_seen_by_nobody_before_it():
    """So a text alone, in a batch, and filled up further all say the same up to their end."""
    ours, _ = make()
    tokens = some_tokens()
    with torch.no_grad():
        states = ours(tokens)
        torch.testing.assert_close(ours(tokens[1:2])[0], states[1], atol=1e-12, rtol=0)
        torch.testing.assert_close(ours(tokens[1:2, :5])[0], states[1, :5], atol=1e-12, rtol=0)
    assert (states[1, 5] - states[1, 6]).abs().max() > 1e-3


def test_too_many_tokens_get_one_sentence():
    with pytest.raises(ValueError, match="at most 12 tokens, got 13: cut the text"):
        TextEncoder(**SMALL)(torch.zeros(1, 13, dtype=torch.long))


def test_config_rebuilds_the_text_tower():
    text = TextEncoder(**SMALL)
    again = TextEncoder(**text.config)
    again.load_state_dict(text.state_dict())
    assert again.config == text.config


# ---- both towers ----------------------------------------------------------------------------------------------------


def their_clip_name(name):
    tower, _, rest = name.partition(".")
    if tower == "text":
        return f"text_model.{their_text_name(rest)}"
    if rest.startswith("layers."):
        return f"vision_model.{their_layer_name(rest)}"
    return renamed(name, BESIDE_THE_LAYERS) if rest.endswith(("weight", "bias")) else BESIDE_THE_LAYERS[name]


BESIDE_THE_LAYERS = {
    "image.patches": "vision_model.embeddings.patch_embedding",
    "image.gather": "vision_model.embeddings.class_embedding",
    "image.position": "vision_model.embeddings.position_embedding.weight",
    "image.norm": "vision_model.post_layernorm",
    "project_text": "text_projection",
    "project_image": "visual_projection",
    "sharpness": "logit_scale",
}


def make_both():
    """Ours and transformers' whole CLIP. Its image tower has one norm more, before the layers, and no bias in its patches."""
    ours = randomise(CLIP(TextEncoder(**SMALL), ImageEncoder(3, 16, 4, 32, 2, 4), END_ID).double())
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        hidden_act="quick_gelu",
    )
    text = their_text_config(ours.text.config)
    both = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    theirs = CLIPModel(both).double().eval()
    theirs.vision_model.pre_layrnorm = torch.nn.Identity()
    theirs.vision_model.embeddings.patch_embedding = torch.nn.Conv2d(3, 32, 4, stride=4).double()
    weights = {their_clip_name(name): w for name, w in ours.state_dict().items()}
    weights["vision_model.embeddings.class_embedding"] = ours.image.gather.flatten()
    theirs.load_state_dict(weights)
    return ours, theirs


def some_pictures(n=4):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_scores_and_loss_equal_transformers():
    """Pooled at the first END (there are many), projected, of length 1, times the sharpness; all captions differ."""
    ours, theirs = make_both()
    x, tokens = some_pictures(), some_tokens()
    with torch.no_grad():
        scores = ours(x, tokens)
        judged = theirs(pixel_values=x, input_ids=tokens, return_loss=True)
        assert error(ours.texts(tokens), judged.text_embeds) < 1e-9
        assert error(ours.images(x), judged.image_embeds) < 1e-9
    assert error(scores, judged.logits_per_image) < 1e-9
    assert contrast(scores, torch.arange(4)).item() == pytest.approx(judged.loss.item(), rel=1e-6)


def test_what_follows_the_first_end_does_not_count():
    ours, _ = make_both()
    tokens = some_tokens()
    other = tokens.clone()
    other[:3, 10:] = 7  # far behind the first END of three of the texts
    with torch.no_grad():
        torch.testing.assert_close(ours.texts(other), ours.texts(tokens), atol=1e-12, rtol=0)


def test_a_picture_alone_gives_the_same_as_in_a_batch():
    ours, _ = make_both()
    with torch.no_grad():
        together = ours.images(some_pictures())
        for i in range(4):
            torch.testing.assert_close(ours.images(some_pictures()[i : i + 1])[0], together[i], atol=1e-12, rtol=0)


def test_patches_are_a_set_but_for_their_positions():
    ours, _ = make_both()
    x = some_pictures()
    mirrored = torch.cat(list(reversed(x.split(4, dim=3))), dim=3)  # columns of patches in another order
    with torch.no_grad():
        before = ours.images(x)
        assert (ours.images(mirrored) - before).abs().max() > 1e-3
        positions = ours.image.position.data
        positions[1:] = positions[1:].view(4, 4, -1).flip(1).reshape(16, -1)
        torch.testing.assert_close(ours.images(mirrored), before, atol=1e-12, rtol=0)


def test_sharpness_begins_as_in_the_paper_and_ends_at_100():
    clip = CLIP(TextEncoder(**SMALL), ImageEncoder(3, 16, 4, 32, 1, 4), END_ID)
    x, tokens = some_pictures(4).float(), some_tokens()
    cosines = clip.images(x) @ clip.texts(tokens).T
    torch.testing.assert_close(clip(x, tokens), cosines / 0.07)
    clip.sharpness.data.fill_(9.0)
    torch.testing.assert_close(clip(x, tokens), 100 * cosines, rtol=0.01, atol=0)


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_perfect_scores_cost_what_cannot_be_known():
    """Of n equal captions nobody can say which is meant: log n. The pictures of the batch: 3 equal ones, 2, 1."""
    captions = torch.tensor([7, 2, 7, 9, 2, 7])
    perfect = 200.0 * (captions[:, None] == captions[None])
    expected = (3 * math.log(3) + 2 * math.log(2)) / 6
    assert contrast(perfect, captions).item() == pytest.approx(expected, abs=1e-6)
    for seed in range(5):
        worse = perfect + torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        assert contrast(worse, captions) > expected
    for numbers, drawn in ((captions, False), (torch.arange(6), True)):  # were all six different, one score would have to rise
        scores = perfect.clone().requires_grad_()
        (slope,) = torch.autograd.grad(contrast(scores, numbers), scores)
        assert (slope.abs().max() > 0.1) == drawn
    assert contrast(torch.zeros(6, 6), captions).item() == pytest.approx(math.log(6))


def test_equal_captions_are_equally_right():
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    captions = torch.tensor([5, 3, 5, 8])
    loss = contrast(scores, captions)
    assert contrast(scores[:, [2, 1, 0, 3]], captions).item() == pytest.approx(loss.item())  # captions 0 and 2 exchanged
    assert contrast(scores[:, [1, 0, 2, 3]], captions).item() != pytest.approx(loss.item())
    assert contrast(scores.T, captions).item() == pytest.approx(loss.item())  # pictures and captions play the same part


def test_pairs_learn_to_find_each_other():
    """A few steps on eight drawings; everything gets a gradient."""
    torch.manual_seed(0)
    pictures, _, captions = draw(8, 16, seed=3)
    words = Tokenizer.of_words(captions)
    text = TextEncoder(words.size, 16, 1, 2, 20)
    clip = CLIP(text, ImageEncoder(3, 16, 4, 16, 1, 2), words.end)
    optimizer = torch.optim.Adam(clip.parameters(), lr=3e-3)
    tokens, number = words(captions), torch.tensor([captions.index(c) for c in captions])
    losses = []
    for _ in range(40):
        loss = contrast(clip(pictures, tokens), number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(p.grad.abs().max() > 0 for name, p in clip.named_parameters() if not name.endswith("k.bias"))


# ---- the tokenizer of words -----------------------------------------------------------------------------------------

CAPTIONS = ["an orange tabby cat with green eyes on a blue background", "a white cat with blue eyes on a pink background"]


def words_of(tokenizer, row):
    return [tokenizer.rules.id_to_token(i) for i in row.tolist()]


def test_a_text_is_start_words_end_and_filled_up_with_end():
    words = Tokenizer.of_words(CAPTIONS, length=8)
    rows = words(["a blue cat", ""])
    assert rows.dtype == torch.long and rows.shape == (2, 8)
    assert words_of(words, rows[0]) == [START, "a", "blue", "cat", END, END, END, END]
    assert words_of(words, rows[1]) == [START] + 7 * [END]
    assert torch.equal(words("a blue cat"), rows[:1])  # one text is a list of one
    assert words.size == 3 + len({word for caption in CAPTIONS for word in caption.split()})


def test_the_longest_caption_fits_up_to_clips_own_length():
    for words, length in ((18, 20), (19, 21), (75, 77), (90, 77)):
        tokenizer = Tokenizer.of_words(["a cat", " ".join(["very"] * words)])
        assert tokenizer.length == length and tokenizer("a cat").shape == (1, length)


def test_scores_are_exact_in_bfloat16_too():
    torch.manual_seed(0)
    words = Tokenizer.of_words(CAPTIONS)
    clip = CLIP(TextEncoder(words.size, 16, 1, 2, 20), ImageEncoder(3, 16, 4, 16, 1, 2), words.end)
    x, tokens = torch.randn(8, 3, 16, 16), words(CAPTIONS[:8])
    with torch.autocast("cpu", torch.bfloat16):
        scores = clip(x, tokens)
        images, texts = clip.images(x), clip.texts(tokens)
    exact = 1 / 0.07 * images.float() @ texts.float().T
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=1e-3, atol=1e-3)


def test_capitals_spaces_and_punctuation_do_not_matter():
    words = Tokenizer.of_words(CAPTIONS)
    assert torch.equal(words("  A Blue\n\tCAT "), words("a blue cat"))
    row = words_of(words, words("a cat, blue!")[0])
    assert row[:7] == [START, "a", "cat", UNKNOWN, "blue", UNKNOWN, END]  # punctuation is a word of its own


def test_a_text_that_is_too_long_keeps_start_and_end_and_names_what_was_cut():
    words = Tokenizer.of_words(CAPTIONS, length=6)
    long = "A white Cat with  Blue eyes, on a pink background"
    assert words_of(words, words(long)[0]) == [START, "a", "white", "cat", "with", END]
    assert words.left_out(long) == "Blue eyes, on a pink background"  # as it was typed
    assert words.left_out("a white cat with") == words.left_out("") == ""  # just fits


def test_unknown_words_are_named_as_typed():
    words = Tokenizer.of_words(CAPTIONS)
    assert words.unknown("a Purple cat with Pyjamas") == ["Purple", "Pyjamas"]
    assert words.unknown("a white cat") == words.unknown("") == []
    assert words.unknown("Na\u00efve eyes, or nai\u0308ve?") == ["Na\u00efve", ",", "or", "nai\u0308ve", "?"]


def test_the_order_of_the_captions_does_not_change_the_vocabulary():
    _, _, captions = draw(64, 8)
    one, other = Tokenizer.of_words(captions), Tokenizer.of_words(captions[::-1])
    assert torch.equal(one(captions), other(captions))


def test_rules_without_start_or_end_get_one_sentence():
    rules = Tokenizer.of_words(CAPTIONS).rules
    words = Tokenizer(rules, 5)
    assert words("a cat").tolist() == Tokenizer.of_words(CAPTIONS, 5)("a cat").tolist()
    with pytest.raises(ValueError, match="a vocabulary with the tokens"):
        Tokenizer(Rules(models.WordLevel({"cat": 0}, unk_token="cat")), 5)
