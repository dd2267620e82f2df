"""How long a training will take, and in which precision it is faster."""

import math
import statistics
import sys
import time
from collections.abc import Callable

import torch

from toolbox.device import PROCESSES, all_reduce_mean
from toolbox.run import Run

Work = Callable[[str], None]  # called with the precision


def announce(run: Run, step: Work, preview_call: Work, preview_calls: int) -> None:
    """Time whole steps in float32 and bfloat16, take the faster, and say what will happen."""
    if run.step >= run.steps:
        print(f"{run.folder} holds this training, finished after {run.step} steps: more")
        print("--steps continue it, another --out starts anew", flush=True)
        return
    seconds = {}
    for precision in [run.precision] if run.precision else ["float32", "bfloat16"]:
        limit = 3 * min(seconds.values(), default=math.inf)
        seconds[precision] = all_reduce_mean(median_seconds(run, step, precision, limit))
    run.precision = min(seconds, key=seconds.get)
    previews = len([k for k in range(run.step, run.steps) if run.preview_after(k + 1)])
    preview = preview_calls * median_seconds(run, preview_call, run.precision)
    left = (run.steps - run.step) * seconds[run.precision] + previews * preview
    images, parameters = run.data.images, sum(w.numel() for w in run.network.parameters())
    timed = ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items() if s < math.inf)
    processes = f" x {PROCESSES} processes" if PROCESSES > 1 else ""
    print(f"data      {run.data.name}: {len(images):,} of {'x'.join(map(str, images.shape[1:]))}")
    print(f"network   {parameters / 1e6:.1f} million parameters")
    print(f"device    {run.device}{processes}, {run.precision} (a step takes {timed})")
    print(f"training  steps {run.step} to {run.steps} of {run.batch} images: ", end="")
    print(f"about {left / 60:.1f} minutes, {previews * preview / 60:.1f} of them for previews")
    print(f"folder    {run.folder}", flush=True)
    if run.device.type == "cuda" and sys.platform == "linux" and left > 300:
        run.network.compile()  # takes a minute or two, so only a longer run gains


def median_seconds(run: Run, work: Work, precision: str, limit: float = math.inf) -> float:
    """Median seconds of `work`; only one try if it exceeds the limit."""
    seconds = []
    try:
        while len(seconds) < 6 and (not seconds or min(seconds) < limit):
            start = time.perf_counter()
            work(precision)
            if run.device.type != "cpu":  # a GPU computes while Python continues
                getattr(torch, run.device.type).synchronize()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, TypeError):  # this device has no bfloat16
        if precision == "float32" or precision == run.precision:
            raise
        return math.inf
    return statistics.median(seconds[1:] or seconds)  # the first one also allocates
