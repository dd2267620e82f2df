"""What the pages show is true: code is the code, commands parse, snippets run, links lead on."""

import argparse
import hashlib
import importlib
import re
import shlex
import sys
import textwrap

import pytest
import torch
from conftest import ROOT

from toolbox.cats import draw
from toolbox.images import save_image, to_image

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += [ROOT / f"{room}/README.md" for room in ("latent_ext", "models")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = (ROOT / "docs/reproduce.sh", ROOT / "benchmarks/gpu.sh")
ROOMS = (ROOT, ROOT / "toolbox", ROOT / "latent_ext", ROOT / "docs")
CODE = "".join(path.read_text("utf-8") for room in ROOMS for path in room.glob("*.py"))
PROGRAMS = r"python3? (?:-m )?(train|sample|evaluate|(?:latent_ext|docs|benchmarks)\.\w+)(?:\.py)?"


def text(path):
    return path.read_text("utf-8")


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks():
    for path in PAGES:
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", text(path), flags=re.DOTALL)):
            yield pytest.param(block, id=f"{name(path)} {i}")


def without_indentation(code):
    return "\n".join(line.strip() for line in code.strip().splitlines())


@pytest.fixture
def names():
    """What a snippet may use: the code's names, and small things of the names it shows."""
    scope = {}
    for module in ("train", "latent_ext.guidance", "latent_ext.vae", "unet", "processes"):
        scope |= vars(importlib.import_module(module))
    scope |= {"schedule": scope["NoiseSchedule"].sigmoid(), "t": torch.tensor([3, 900])}
    scope |= {"vae": scope["VAE"](channels=(4, 4, 8), groups=4), "latents": torch.randn(2, 4, 8, 8)}
    scope |= {"predict_noise": lambda x, t, *context: 0.5 * x}
    scope |= dict.fromkeys(("context", "null_context"), torch.zeros(2, 1))
    return scope | {"x0": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("block", [*blocks()])
def test_a_block_of_code_is_the_code_or_runs(block, names):
    if without_indentation(block) not in without_indentation(CODE):
        exec(textwrap.dedent(block), names)


class Parsed(Exception):
    """The program's parser took its words."""


def commands():
    for path in (*PAGES, *SCRIPTS):
        shown = re.findall(r"`([^`\n]+)`", text(path))
        for block in re.findall(r"```bash\n(.*?)```", text(path), flags=re.DOTALL):
            shown += block.splitlines()
        if path in SCRIPTS:  # with numbers in place of variables
            shown = re.sub(r'"\$(?:n|rounds|\(steps \d+\))"', "8", text(path))
            shown = shown.replace("\\\n", "").splitlines()
        for line in dict.fromkeys(shown):
            found = re.search(rf"{PROGRAMS}(?= |$)(.*)", line.split("  #")[0])
            if found and found[2].strip() and "..." not in line:
                yield pytest.param(*found.groups(), id=f"{name(path)}: {line.strip()}")


@pytest.mark.parametrize(("program", "words"), [*commands()])
def test_a_command_parses(program, words, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser):
        raise Parsed(parse(parser))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [program, *shlex.split(words.split(" && ")[0])])
    with pytest.raises(Parsed):
        importlib.import_module(program).main()


def snippets():
    for path in PAGES:
        for code in re.findall(r'python -c "(.*?)"', text(path)):
            yield pytest.param(code, id=f"{name(path)}: {code}")


@pytest.mark.parametrize("code", [*snippets()])
def test_a_snippet_runs(code, here):
    for i, image in enumerate(draw(40, 20)[0]):
        save_image(to_image(image), here / "my-photos" / f"{i}.png")
    exec(code, {})


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_on(path):
    for link in re.findall(r"\]\(([^)#]+)\)", text(path)):
        assert link.startswith("https://") or (path.parent / link).exists(), link


@pytest.mark.parametrize(
    ("files", "rooms"),
    [
        (["processes.py", "unet.py"], set()),
        (["train.py", "sample.py", "evaluate.py"], {"processes", "unet", "toolbox", "train"}),
        ([*map(name, (ROOT / "toolbox").glob("*.py"))], {"processes", "unet", "toolbox"}),
    ],
)
def test_the_core_imports_nothing_of_the_extension(files, rooms):
    own = {"processes", "unet", "train", "sample", "evaluate", "toolbox", "latent_ext"}
    for file in files:
        imported = re.findall(r"^ *(?:from|import) (\w+)", text(ROOT / file), flags=re.MULTILINE)
        assert own.intersection(imported) <= rooms, file


def test_the_checksums_are_those_of_all_pretrained_models():
    models = ROOT / "models"
    listed = dict(line.split()[::-1] for line in text(models / "SHA256SUMS").splitlines())
    files = [path for path in models.rglob("*") if path.suffix in (".pt", ".safetensors")]
    found = {path.relative_to(models).as_posix(): path.read_bytes() for path in files}
    assert listed == {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    assert sum(map(len, found.values())) < 60e6
