"""Exercises: `python -m docs.homework FOLDER` copies the repository, with ten bodies left blank.

Fill them in, and repeat the command: it runs the test of each and says how far you are.
With --hunt N the copy is complete, but has bug N of docs/lab.md in it: find it.
"""

import argparse
import ast
import shutil
import subprocess
import sys
from pathlib import Path

from docs.lab import BUGS, ROOT
from toolbox.files import UserError, check_number, user_errors

TASKS = {  # file:function -> a test that it must pass
    "processes.py:NoiseSchedule.sigmoid": "test_math.py::test_schedules",
    "processes.py:add_noise": "test_math.py::test_add_noise_is_many_small_steps",
    "processes.py:sample": "test_math.py::test_a_step_with_eta_1_is_the_posterior",
    "processes.py:noise_from_velocity": "test_math.py::test_flow",
    "unet.py:timestep_embedding": "test_math.py::test_timestep_embedding",
    "unet.py:SelfAttention.forward": "test_math.py::test_attention",
    "train.py:update_ema": "test_math.py::test_ema",
    "latent_ext/guidance.py:guided": "test_math.py::test_guidance",
    "latent_ext/vae.py:kl_divergence": "test_math.py::test_vae_bound",
    "latent_ext/clip.py:contrastive_loss": "test_math.py::test_contrastive_loss",
}
LEFT_OUT = (".*", "runs", "data", "__pycache__", "*.png", "*.gif")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the copy is made, or is")
    parser.add_argument("--hunt", type=int, metavar="N", help=f"one bug, 1 to {len(BUGS)}")
    args = parser.parse_args()
    if args.folder.exists():
        report(args.folder)
        return
    if args.hunt is not None:
        check_number("--hunt", args.hunt, 1, len(BUGS))
    if ROOT in args.folder.resolve().parents:
        raise UserError(f"{args.folder}: expected a folder outside of {ROOT}")
    shutil.copytree(ROOT, args.folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    if args.hunt is None:
        for task in TASKS:
            blank(args.folder, task)
        print(f"{args.folder}: fill in what raises NotImplementedError, and repeat this command")
        for task, test in TASKS.items():
            print(f"  {task:38} python -m pytest tests/{test}")
    else:
        file, line, instead, _ = [*BUGS.values()][args.hunt - 1]
        source = (args.folder / file).read_text("utf-8")
        (args.folder / file).write_text(source.replace(line, instead), "utf-8")
        print(f"{args.folder}: one line is wrong. Train, sample, look; then ask python -m pytest")


def blank(folder: Path, task: str) -> None:
    """Take the body out of a function, but for its docstring; of `sample` only the four lines."""
    file, name = task.split(":")
    source = (folder / file).read_text("utf-8")
    body = ast.parse(source).body
    for part in name.split("."):
        body = next(node for node in body if getattr(node, "name", None) == part).body
    body = body[1:] if isinstance(body[0], ast.Expr) else body
    if name == "sample":
        loop = next(node for node in body if isinstance(node, ast.For)).body
        body = loop[3:-1]  # what comes between the predicted noise and on_step
    lines, first = source.splitlines(), body[0]
    todo = f'{" " * first.col_offset}raise NotImplementedError("homework: {name}")'
    lines[first.lineno - 1 : body[-1].end_lineno] = [todo]
    (folder / file).write_text("\n".join(lines) + "\n", "utf-8")


def report(folder: Path) -> None:
    """Which of the tasks pass their test, in the copy?"""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--no-header"]
    tests = [f"tests/{test}" for test in TASKS.values()]
    result = subprocess.run([*command, *tests], cwd=folder, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    for task, test in TASKS.items():
        outcomes = {line.split()[0] for line in lines if f" tests/{test}" in line}
        print(f"{'done ' if outcomes == {'PASSED'} else 'to do'}  {task:38} tests/{test}")


if __name__ == "__main__":
    with user_errors():
        main()
