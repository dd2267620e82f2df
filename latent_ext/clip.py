"""CLIP: a text encoder and an image encoder that learn from captioned images to agree.

Radford et al. 2021: the vector of an image points where the vector of its caption points. Stable
Diffusion needs only the text encoder: its output at each token is the context of the U-Net.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rules  # how the library splits a text; Tokenizer is ours
from torch import Tensor, nn

from latent_ext.attention import attend
from toolbox.files import UserError

START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
PIECES = (  # CLIP's pattern for splitting a text
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


class Tokenizer:
    """Texts -> tokens (B, length) long: words or pieces of words, START ... END, padded with END.

    rules: how to split a text. A text of more than length - 2 tokens is cut; `truncated` returns
    what is lost.
    """

    def __init__(self, rules: Rules, length: int):
        self.rules, self.length = rules, length
        self.start, self.end = rules.token_to_id(START), rules.token_to_id(END)
        if self.start is None or self.end is None:
            raise UserError(f"the vocabulary lacks {START} or {END}")
        rules.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, self.start), (END, self.end)]
        )
        rules.enable_truncation(length)
        rules.enable_padding(length=length, pad_id=self.end, pad_token=END)

    @classmethod
    def of_words(cls, captions: Sequence[str], length: int | None = None) -> "Tokenizer":
        """Each word of the captions becomes a token; all other words are UNKNOWN.

        length: by default the longest caption fits; it is at least 20 and at most 77 (CLIP's).
        """
        rules = Rules(models.WordLevel(unk_token=UNKNOWN))
        rules.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        rules.pre_tokenizer = pre_tokenizers.Whitespace()  # words and punctuation
        special = [UNKNOWN, START, END]
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
        rules.train_from_iterator(captions, trainer)
        longest = max((len(rules.encode(caption).ids) for caption in set(captions)), default=0)
        return cls(rules, length or min(max(20, longest + 2), 77))

    @classmethod
    def of_clip(cls, merges: Sequence[str], vocabulary: dict[str, int], length: int) -> "Tokenizer":
        """CLIP's byte-pair encoding. Each line of merges ("th e</w>") joins two tokens into one.

        </w> ends a word. If the vocabulary is empty, tokens are numbered in CLIP's order.
        """
        if not vocabulary:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character for each byte
            joined = [line.replace(" ", "") for line in merges]
            tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *joined, START, END]
            vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(line.split(" ")) for line in merges]
        rules = Rules(models.BPE(vocabulary, pairs, unk_token=END, end_of_word_suffix="</w>"))
        to_spaces = normalizers.Replace(Regex(r"\s+"), " ")
        steps = [normalizers.NFC(), to_spaces, normalizers.Lowercase()]
        rules.normalizer = normalizers.Sequence(steps)
        pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rules.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
        rules.add_special_tokens([START, END])
        return cls(rules, length)

    @classmethod
    def load(cls, folder: Path, length: int) -> "Tokenizer":
        """Read a tokenizer.json, or CLIP's merges.txt with or without its vocab.json."""
        path, vocabulary = folder / "tokenizer.json", folder / "vocab.json"
        try:
            if path.exists():
                rules = Rules.from_file(str(path))
                rules.encode("?")  # fails if unknown words have no token
                return cls(rules, length)
            path = folder / "merges.txt"
            tokens = json.loads(vocabulary.read_text("utf-8")) if vocabulary.exists() else {}
            merges = path.read_text("utf-8").split("\n")[1:]  # the first line is a title
            return cls.of_clip([line for line in merges if line], tokens, length)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{path}: not a tokenizer of CLIP or of this repository ({error}); the folder "
                "`tokenizer` of any Stable Diffusion v1.x of diffusers has CLIP's merges.txt"
            ) from error

    @property
    def size(self) -> int:
        return self.rules.get_vocab_size()

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.tensor([encoding.ids for encoding in self.rules.encode_batch(texts)])

    def truncated(self, text: str) -> str:
        """The end of a text that is too long: what `__call__` cuts off."""
        rest = self.rules.encode(text).overflowing  # each piece begins with START, too
        return text[rest[0].offsets[1][0] :] if rest else ""

    def unknown(self, text: str) -> list[str]:
        """The words that this vocabulary lacks, in the part of the text that is not cut."""
        encoding = self.rules.encode(text)
        tokens = zip(encoding.tokens, encoding.offsets, strict=True)
        return [text[begin:end] for token, (begin, end) in tokens if token == UNKNOWN]


class Layer(nn.Module):
    """A transformer layer (B, N, width) -> the same: attention, then a feed-forward network."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"expected heads that divide the width {width}, got {heads}")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(attend(self.q(y), self.k(y), self.v(y), self.heads, causal))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))  # CLIP's "quick GELU"


class TextEncoder(nn.Module):
    """tokens (B, length) long -> (B, length, width): what each token means, given those before it.

    Causal (a token sees only those before it), as in CLIP. The END token still sees the whole text.
    Padding is not masked: the weights of CLIP and Stable Diffusion expect that.
    hidden: the width inside the feed-forward networks, by default 4 times that of the tokens.
    """

    def __init__(
        self, vocab_size: int, width: int, layers: int, heads: int, length: int, hidden: int = 0
    ):
        super().__init__()
        hidden = hidden or 4 * width
        self.config = {"vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads}
        self.config |= {"length": length, "hidden": hidden}
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(length, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        self.layers = nn.ModuleList([Layer(width, heads, hidden) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: tokens.shape[1]]
        x = self.token_embedding(tokens) + positions  # (B, length, width)
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.norm_out(x)


class ImageEncoder(nn.Module):
    """Images (B, channels, size, size) -> (B, width): a vision transformer.

    Its tokens are patches of patch x patch pixels, and a class token, which collects the result.
    """

    def __init__(self, channels: int, size: int, patch: int, width: int, layers: int, heads: int):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1 + (size // patch) ** 2, width))
        self.layers = nn.ModuleList([Layer(width, heads, 4 * width) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.patches(x), "b c h w -> b (h w) c")
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = layer(x, causal=False)
        return self.norm_out(x[:, 0])


class CLIP(nn.Module):
    """Images (B, C, H, W), tokens (B, length) of B texts -> logits (B, B): how well they fit.

    end: the END token's number. At its first position the text encoder has seen the whole text.
    """

    def __init__(self, text: TextEncoder, image: ImageEncoder, end: int):
        super().__init__()
        self.text, self.image, self.end = text, image, end
        width = text.config["width"]
        self.text_projection = nn.Linear(width, width, bias=False)
        self.image_projection = nn.Linear(image.class_token.shape[2], width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # log of the factor, 14.3

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, length) -> unit vectors (B, width)."""
        ends = (tokens == self.end).int().argmax(dim=1)  # the first END of each text
        x = self.text(tokens)[torch.arange(len(tokens)), ends]
        return F.normalize(self.text_projection(x), dim=1)

    def encode_image(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> unit vectors (B, width)."""
        return F.normalize(self.image_projection(self.image(x)), dim=1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=4.6).exp()  # at most 100
        images, texts = self.encode_image(x).to(scale.dtype), self.encode_text(tokens)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would be off by 0.25
            return scale * images @ texts.to(scale.dtype).T


def contrastive_loss(logits: Tensor, captions: Tensor) -> Tensor:
    """Each image must find its caption in the batch, and each caption its image. math.md (17)

    logits (B, B), one row per image. captions (B,): equal captions have equal numbers, and count
    as equally right.
    """
    same = (captions[:, None] == captions[None, :]).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
