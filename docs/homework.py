"""Exercises: `python -m docs.homework FOLDER` copies the repository, with ten functions left blank.

Fill them in, and repeat the command: it runs their tests and says how far you are.
With --hunt N the copy is complete, but has bug N of docs/lab.md: find it.
"""

import argparse
import ast
import shutil
import subprocess
import sys
from pathlib import Path

from docs.lab import BUGS, ROOT
from toolbox.files import UserError, check_number, user_errors

# A function to fill in, and a test that it must then pass: tests/test_FILE.py::test_NAME.
TABLE = """
processes.py:NoiseSchedule.sigmoid   processes::schedules_equal_diffusers_and_their_papers
processes.py:add_noise               math::add_noise_is_what_many_small_steps_do
processes.py:sample                  math::a_step_at_eta_1_is_the_posterior
processes.py:noise_from_velocity   processes::the_right_v_and_the_right_velocity_are_the_right_noise
unet.py:timestep_embedding           unet::the_timestep_embedding_is_its_formula_cosines_first
unet.py:SelfAttention.forward        unet::equals_diffusers
train.py:update_ema   train::a_step_is_clip_then_muon_for_matrices_and_adamw_for_vectors_then_ema
latent_ext/guidance.py:guided        math::guidance_follows_the_slope_of_a_sharpened_density
latent_ext/vae.py:kl_divergence      math::the_bound_of_an_autoencoder_is_tight_where_it_can_be
latent_ext/clip.py:contrastive_loss  math::the_contrastive_loss_is_its_formula
"""
TASKS = {
    task: "tests/test_{}.py::test_{}".format(*test.split("::"))
    for task, test in map(str.split, TABLE.strip().splitlines())
}
LEFT_OUT = (".*", "runs", "data", "node_modules", "__pycache__", "*.png", "*.gif")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to make the copy, or where it is")
    parser.add_argument("--hunt", type=int, metavar="N", help=f"hide bug N, 1 to {len(BUGS)}")
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
            print(f"  {task:38} python -m pytest {test}")
    else:
        file, line, instead, _ = [*BUGS.values()][args.hunt - 1]
        source = (args.folder / file).read_text("utf-8")
        (args.folder / file).write_text(source.replace(line, instead), "utf-8")
        print(f"{args.folder}: one line is wrong. Train, sample, look; then ask python -m pytest")


def files() -> list[str]:
    return sorted({task.split(":")[0] for task in TASKS})


def blank(folder: Path, task: str) -> None:
    """Take out a function's body, but keep its docstring; take only four lines out of `sample`."""
    file, name = task.split(":")
    source = (folder / file).read_text("utf-8")
    body = ast.parse(source).body
    for part in name.split("."):
        body = next(node for node in body if getattr(node, "name", None) == part).body
    parts, lines = [body[1:] if isinstance(body[0], ast.Expr) else body], source.splitlines()
    if name == "sample":  # x0; and from sigma on to the fresh noise
        loop = next(node for node in body if isinstance(node, ast.For)).body
        parts = [loop[-4:-1], loop[3:4]]
    for part in parts:  # from the last one up: lines above keep their numbers
        todo = f'{" " * part[0].col_offset}raise NotImplementedError("homework: {name}")'
        lines[part[0].lineno - 1 : part[-1].end_lineno] = [todo]
    (folder / file).write_text("\n".join(lines) + "\n", "utf-8")


def report(folder: Path) -> None:
    """Print which tasks of the copy pass their tests."""
    if not (folder / "docs/homework.py").exists():
        raise UserError(f"{folder}: expected a copy that this program made, or a new name")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--no-header"]
    result = subprocess.run([*command, *TASKS.values()], cwd=folder, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    for task, test in TASKS.items():
        outcomes = {line.split()[0] for line in lines if f" {test}" in line}
        print(f"{'done ' if outcomes == {'PASSED'} else 'to do'}  {task:38} {test}")


if __name__ == "__main__":
    with user_errors():
        main()
