"""CLIP: a text tower and an image tower that learn, from pictures and their captions, to give equal things equal numbers.

Radford et al. 2021. Stable Diffusion needs the text tower only: what it says at each token is the context of the U-Net.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rules
from torch import Tensor, nn

START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # CLIP's: what is a word


class Tokenizer:
    """Texts -> numbers of words, or of pieces of words: (B, length) long, each text START ... END, filled up with END.

    rules: of the `tokenizers` library. A text of more than length - 2 tokens is cut; `left_out` tells what is lost.
    """

    def __init__(self, rules: Rules, length: int):
        self.rules, self.length = rules, length
        self.rules.no_padding()
        self.rules.no_truncation()
        self.start, self.end = rules.token_to_id(START), rules.token_to_id(END)
        if self.start is None or self.end is None:
            raise ValueError(f"expected a vocabulary with the tokens {START} and {END}")
        ends = [(START, self.start), (END, self.end)]
        rules.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)

    @classmethod
    def of_words(cls, captions: Sequence[str], length: int | None = None) -> "Tokenizer":
        """Each word of the captions is a token; a word that they do not have is UNKNOWN. The longest one fits, up to 77."""
        rules = Rules(models.WordLevel(unk_token=UNKNOWN))
        rules.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        rules.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])  # words and punctuation
        special = [UNKNOWN, START, END]
        rules.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
        longest = max((len(rules.encode(caption).ids) for caption in set(captions)), default=0) + 2
        return cls(rules, length or min(max(20, longest), 77))

    @classmethod
    def of_clip(cls, merges: Sequence[str], vocabulary: dict[str, int] | None = None, length: int = 77) -> "Tokenizer":
        """CLIP's: each byte is a token, and so is each pair of tokens that a line of merges ("th e</w>") joins.

        </w> ends a word. Without a vocabulary the tokens are numbered in that order.
        """
        if vocabulary is None:
            bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each
            tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), *(line.replace(" ", "") for line in merges), START, END]
            vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(line.split(" ")) for line in merges]
        rules = Rules(models.BPE(vocabulary, pairs, unk_token=END, end_of_word_suffix="</w>"))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        rules.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        rules.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        rules.add_special_tokens([START, END])
        return cls(rules, length)

    @classmethod
    def load(cls, folder: Path, length: int) -> "Tokenizer":
        """From a tokenizer.json; or from CLIP's merges.txt, with or without its vocab.json."""
        if (folder / "tokenizer.json").exists():
            return cls(Rules.from_file(str(folder / "tokenizer.json")), length)
        merges = (folder / "merges.txt").read_text("utf-8").split("\n")[1:]  # the first line is a title
        vocab = folder / "vocab.json"
        vocabulary = json.loads(vocab.read_text("utf-8")) if vocab.exists() else None
        return cls.of_clip([line for line in merges if line], vocabulary, length)

    @property
    def size(self) -> int:
        return self.rules.get_vocab_size()

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [encoding.ids[1:-1][: self.length - 2] for encoding in self.rules.encode_batch(texts)]
        rows = [[self.start, *row, self.end] for row in rows]
        return torch.tensor([row + [self.end] * (self.length - len(row)) for row in rows], dtype=torch.long)

    def left_out(self, text: str) -> str:
        """The end of a text that is too long: what `__call__` cuts off."""
        offsets = self.rules.encode(text).offsets[1:-1]
        return text[offsets[self.length - 2][0] :] if len(offsets) > self.length - 2 else ""

    def unknown(self, text: str) -> list[str]:
        """The words that this vocabulary does not have."""
        encoding = self.rules.encode(text)
        return [text[a:b] for token, (a, b) in zip(encoding.tokens, encoding.offsets, strict=True) if token == UNKNOWN]


class Layer(nn.Module):
    """A transformer layer (B, N, width) -> the same: tokens look at each other, then each thinks alone; norms come first."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.hidden, self.back = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        y = self.norm1(x)
        q, k, v = (rearrange(to(y), "b n (heads d) -> b heads n d", heads=self.heads) for to in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # causal: a token sees those before it
        x = x + self.out(rearrange(seen, "b heads n d -> b n (heads d)"))
        y = self.hidden(self.norm2(x))
        return x + self.back(y * torch.sigmoid(1.702 * y))  # "quick GELU": CLIP's weights are trained with this one


class TextEncoder(nn.Module):
    """tokens (B, length) long -> (B, length, width): what each token means, given the tokens before it.

    Causal, though nothing is generated here: so it was trained, and the END token sees the whole text in any case. What
    fills a text up is not masked: CLIP's and Stable Diffusion's weights expect that.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or 4 * width
        self.config = {
            "vocabulary": vocabulary,
            "width": width,
            "layers": layers,
            "heads": heads,
            "length": length,
            "hidden": hidden,
        }
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.01)
        self.layers = nn.ModuleList([Layer(width, heads, hidden) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.config["length"]:
            raise ValueError(f"expected at most {self.config['length']} tokens, got {tokens.shape[1]}: cut the text")
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # (B, length, width)
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.norm(x)


class ImageEncoder(nn.Module):
    """Pictures (B, channels, size, size) -> (B, width): patches are its tokens, and one more gathers what they say (a ViT)."""

    def __init__(self, channels: int, size: int, patch: int, width: int, layers: int, heads: int):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.gather = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1 + (size // patch) ** 2, width))
        self.layers = nn.ModuleList([Layer(width, heads, 4 * width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.patches(x), "b c h w -> b (h w) c")
        x = torch.cat([self.gather.expand(len(x), -1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = layer(x, causal=False)
        return self.norm(x[:, 0])


class CLIP(nn.Module):
    """Pictures (B, C, H, W) and the tokens of as many texts (B, length) -> how well each picture fits each text, (B, B).

    end: the number of the END token, at whose first place a text's tower has seen the whole text.
    """

    def __init__(self, text: TextEncoder, image: ImageEncoder, end: int):
        super().__init__()
        self.text, self.image, self.end = text, image, end
        self.project_text = nn.Linear(text.config["width"], text.config["width"], bias=False)
        self.project_image = nn.Linear(image.norm.normalized_shape[0], text.config["width"], bias=False)
        self.sharpness = nn.Parameter(torch.tensor(1 / 0.07).log())  # learned: how much a small difference shall count

    def texts(self, tokens: Tensor) -> Tensor:
        """(B, length) -> (B, width), of length 1."""
        states = self.text(tokens)
        ends = (tokens == self.end).int().argmax(dim=1)  # the first one
        return F.normalize(self.project_text(states[torch.arange(len(states)), ends]), dim=1)

    def images(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width), of length 1."""
        return F.normalize(self.project_image(self.image(x)), dim=1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        images, texts, exact = self.images(x), self.texts(tokens), self.sharpness.dtype
        with torch.autocast(x.device.type, enabled=False):  # a score near 100, rounded to 8 bits, would be off by 0.25
            return self.sharpness.clamp(max=4.6).exp() * images.to(exact) @ texts.to(exact).T  # at most e^4.6 = 100


def contrast(scores: Tensor, captions: Tensor) -> Tensor:
    """Each picture shall find its caption among those of the batch, and each caption its picture. math.md (17)

    scores (B, B), a row for each picture; captions (B,): equal numbers for equal captions, which are equally right.
    """
    same = (captions[:, None] == captions[None, :]).float()
    right = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
