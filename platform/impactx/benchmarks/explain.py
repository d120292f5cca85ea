"""The speed of maps: against the model's forward pass alone, and against shap itself.

The forward pass is the limit of any engine that runs the model on each masked image. It is measured
with the same model in its fastest form (as it is, channels-last, or frozen) at its fastest batch
size, on inputs that are ready. Short runs of all forms choose the best three, which then run
longer. shap explains the same images with the same settings at its own best: the model in the
fastest form, and one masker for all images. All take turns, with the limit before and after this
package's engine, whose speed is compared with the mean of both, because a machine's speed drifts
while maps are made. Ratios are taken within a round, and their medians are printed.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from impactx.benchmarks.train import random_images
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.partition.engine import partition_shap
from impactx.explain.partition.fast import FastScore, Score, fast_score
from impactx.models import build_classifier
from impactx.settings import ModelSettings

MODELS = ("lenet5", "mobilenetv1_100", "tf_efficientnet_b2")
MEMORY = 2**29  # the default of the setting cluster.explain_memory_mb, in bytes
FORWARD_BATCHES = {"cpu": (50, 100, 200, 400), "cuda": (512, 2048, 8192)}
SCREEN_SECONDS, LIMIT_SECONDS, CANDIDATES = 0.3, 2.0, 3
PROCESS_ROUNDS, PROCESS_SECONDS = 3, 10.0
HEAD = (f"{'model':24} {'maps/s':>8} {'evals/s':>9} {'limit':>9} {'of limit':>9} {'unsplit':>8} "
        f"{'shap maps/s':>12} {'x shap':>7} {'2 proc/1':>9} {'peak MiB':>9} {'4x images':>9}")
Rate = Callable[[float], float]  # seconds that it may run -> evaluations per second


@dataclass(frozen=True)
class Effort:
    """The settings of the explainers: shap's max_evals and batch_size."""

    max_evals: int
    batch_size: int

    def explain(self, score: Score | FastScore, images: Tensor | np.ndarray,
                labels: Tensor | np.ndarray, memory_bytes: int = 2**30) -> None:
        """Make maps with this package's engine.

        Args:
            score: The model.
            images: uint8 (N, H, W, 3) or float (N, 3, H, W) in [0, 1].
            labels: The explained class of each image, (N,).
            memory_bytes: The engine's limit.
        """
        partition_shap(score, images, labels, max_evals=self.max_evals,
                       batch_size=self.batch_size, memory_limit_bytes=memory_bytes)


@dataclass(frozen=True)
class Case:
    """The speed of explaining one model; medians over rounds.

    Attributes:
        model: The model's name.
        maps_per_s: Maps per second of this package.
        evals_per_s: Its evaluations per second.
        limit_evals_per_s: Evaluations per second of the fastest forward pass alone.
        limit_form: The form of the model and the batch size of that.
        head_split: Whether this package splits the model's first layer off.
        of_limit: evals_per_s as a share of the limit.
        unsplit_of_limit: The same if the first layer is not split off.
        shap_maps_per_s: Maps per second of shap.
        times_shap: Speed of this package as a multiple of shap's.
        peak_mib: Peak memory of a process that explains some images.
        peak_mib_4x: The same for four times as many.
        two_over_one: Maps per second of two processes as a multiple of one's; None if it was not
            measured.
    """

    model: str
    maps_per_s: float
    evals_per_s: float
    limit_evals_per_s: float
    limit_form: str
    head_split: bool
    of_limit: float
    unsplit_of_limit: float
    shap_maps_per_s: float
    times_shap: float
    peak_mib: float
    peak_mib_4x: float
    two_over_one: float | None = None

    def line(self) -> str:
        """Return a line of the printed table."""
        two = f"{'-':>9}" if self.two_over_one is None else f"{self.two_over_one:9.2f}"
        return (f"{self.model:24} {self.maps_per_s:8.2f} {self.evals_per_s:9.0f} "
                f"{self.limit_evals_per_s:9.0f} {self.of_limit:9.2f} {self.unsplit_of_limit:8.2f} "
                f"{self.shap_maps_per_s:12.3f} {self.times_shap:7.1f} {two} {self.peak_mib:9.0f} "
                f"{self.peak_mib_4x:9.0f}   ({self.limit_form}; "
                f"{'first layer split off' if self.head_split else 'not split'})")


def _as_a_worker() -> None:
    """Set this process up like one that makes maps; the limit and shap run in the same."""
    torch.set_num_threads(1)
    keep_freed_memory()


def _model(architecture: str, size: int, device: str) -> nn.Module:
    settings = ModelSettings(name="measured", architecture=architecture)
    model = build_classifier(settings, 10, (size, size), seed=0, load_weights=False)
    return model.to(device).eval()


def _seconds(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _rate(model: Score, inputs: Tensor, device: str, seconds: float) -> float:
    """Return the evaluations per second of a model's forward pass on one batch."""
    def forward(calls: int) -> None:
        for _ in range(calls):
            model(inputs)

    with torch.inference_mode():
        calls = max(1, round(seconds / _seconds(partial(forward, 1), device)))
        return len(inputs) * calls / _seconds(partial(forward, calls), device)


def _forms(model: nn.Module, shape: tuple[int, int, int], device: str) -> dict[str, Rate]:
    """Return the speed of the forward pass in each form of the model and each batch size."""
    frozen = fast_score(model, shape, split=False).score
    rearranged = copy.deepcopy(model).to(memory_format=torch.channels_last)
    rates: dict[str, Rate] = {}
    for batch in FORWARD_BATCHES["cpu" if device == "cpu" else "cuda"]:
        inputs = torch.rand((batch, *shape), device=device)
        last = inputs.to(memory_format=torch.channels_last)
        forms: tuple[tuple[str, Score, Tensor], ...] = (
            ("as it is", model, inputs), ("channels-last", rearranged, last),
            ("frozen", frozen, inputs))
        for name, form, x in forms:
            rates[f"{name}, {batch}"] = partial(_rate, form, x, device)
    return rates


def _explain_by_shap(score: Score, images: Tensor, labels: Tensor, effort: Effort, device: str,
                     masker: Any) -> None:
    import shap

    def scores_of(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)
            return score(x).cpu().numpy()

    explainer = shap.PartitionExplainer(scores_of, masker)
    for image, label in zip(images, labels, strict=True):
        # shap's cache of the blur is keyed by id(), which a new image may have again.
        masker.last_xid = None
        explainer(image.permute(1, 2, 0).contiguous().numpy()[None], outputs=[int(label)],
                  silent=True, max_evals=effort.max_evals, batch_size=effort.batch_size)


def _worker(architecture: str, size: int, count: int, effort: Effort, barrier: Any, queue: Any
            ) -> None:
    _as_a_worker()
    model, (pixels, labels) = _model(architecture, size, "cpu"), random_images(count, size)
    score = fast_score(model, (3, size, size))
    effort.explain(score, pixels[:4], labels[:4])
    barrier.wait()
    queue.put(_seconds(lambda: effort.explain(score, pixels, labels), "cpu"))


def processes_rate(architecture: str, processes: int, *, size: int, count: int,
                   effort: Effort) -> float:
    """Measure single-threaded processes that explain images at the same time.

    Args:
        architecture: lenet5 or the name of a timm model.
        processes: Their number.
        size: The side of images in pixels.
        count: Images of each process.
        effort: The explainer's settings.

    Returns:
        Maps per second of all together.
    """
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    arguments = (architecture, size, count, effort, barrier, queue)
    running = [context.Process(target=_worker, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    seconds: list[float] = [queue.get(timeout=600) for _ in running]
    for process in running:
        process.join()
    return processes * count / max(seconds)


def _memory_worker(architecture: str, size: int, count: int, effort: Effort, device: str,
                   queue: Any) -> None:
    _as_a_worker()
    score = fast_score(_model(architecture, size, device), (3, size, size))
    peaks = []
    for images in (count, 4 * count):
        pixels, labels = random_images(images, size)
        effort.explain(score, torch.from_numpy(pixels).to(device), labels, MEMORY)
        peaks.append(torch.cuda.max_memory_allocated() / 2**20 if device != "cpu"
                     else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    queue.put(peaks)


def peak_memory(architecture: str, *, size: int, count: int, effort: Effort, device: str
                ) -> tuple[float, float]:
    """Measure the peak memory of a process that explains images, and then four times as many.

    Args:
        architecture: lenet5 or the name of a timm model.
        size: The side of images in pixels.
        count: Images of the first round.
        effort: The explainer's settings.
        device: As torch names it.

    Returns:
        Both peaks in MiB. On a CPU it is all that the process holds, libraries and maps included;
        on a GPU, what torch holds there.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory_worker,
                              args=(architecture, size, count, effort, device, queue))
    process.start()
    few, many = queue.get(timeout=900)
    process.join()
    return few, many


def measure(architecture: str, *, images: int, size: int, shap_images: int, rounds: int,
            device: str, effort: Effort, processes: bool) -> Case:
    """Measure one model in all ways, in turn.

    Args:
        architecture: lenet5 or the name of a timm model.
        images: Images that this package explains in a round.
        size: Their side in pixels.
        shap_images: Images that shap explains in a round.
        rounds: Number of rounds.
        device: As torch names it.
        effort: The settings of both explainers.
        processes: Whether two processes are compared with one (on a CPU only).
    """
    import shap

    model, shape = _model(architecture, size, device), (3, size, size)
    pixels, classes = random_images(images, size)
    stack = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(classes)
    forms = _forms(model, shape, device)
    score, unsplit = fast_score(model, shape), fast_score(model, shape, split=False)
    head_split = score.head is not None
    masker = shap.maskers.Image("blur(16,16)", (size, size, 3))
    on_device = stack.to(device)
    ways = {"ours": score} | ({"unsplit": unsplit} if head_split else {})
    for form in forms.values():
        form(0)  # warms up: oneDNN makes its kernels
    effort.explain(score, on_device[:2], labels[:2])
    screened = {name: statistics.median(form(SCREEN_SECONDS) for _ in range(5))
                for name, form in forms.items()}
    best = sorted(screened, key=lambda name: screened[name])[-CANDIDATES:]
    rates: dict[str, list[float]] = {name: [] for name in [*ways, *best, "shap"]}
    for _ in range(rounds):
        limits = [{name: forms[name](LIMIT_SECONDS) for name in best}]
        for name, way in ways.items():
            work = partial(effort.explain, way, on_device, labels)
            rates[name].append(images / _seconds(work, device))
        limits.append({name: forms[name](LIMIT_SECONDS) for name in best})
        for name in best:
            rates[name].append(statistics.mean(limit[name] for limit in limits))
        work = partial(_explain_by_shap, unsplit.score, stack[:shap_images], labels[:shap_images],
                       effort, device, masker)
        rates["shap"].append(shap_images / _seconds(work, device))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    fastest = max(best, key=lambda name: medians[name])

    def ratio(name: str, other: str, times: float = 1.0) -> float:
        return statistics.median(
            times * a / b for a, b in zip(rates[name], rates[other], strict=True))

    peaks = peak_memory(architecture, size=size, count=max(2, images // 4), effort=effort,
                        device=device)
    two_over_one = None
    if processes and device == "cpu":
        two_over_one = _two_over_one(architecture, size, medians["ours"], effort)
    return Case(
        model=architecture, maps_per_s=medians["ours"],
        evals_per_s=medians["ours"] * effort.max_evals, limit_evals_per_s=medians[fastest],
        limit_form=fastest, head_split=head_split,
        of_limit=ratio("ours", fastest, effort.max_evals),
        unsplit_of_limit=ratio("unsplit" if head_split else "ours", fastest, effort.max_evals),
        shap_maps_per_s=medians["shap"], times_shap=ratio("ours", "shap"),
        peak_mib=peaks[0], peak_mib_4x=peaks[1], two_over_one=two_over_one)


def _two_over_one(architecture: str, size: int, maps_per_s: float, effort: Effort) -> float:
    """Return the speed of two processes as a multiple of one's."""
    count = max(2, round(PROCESS_SECONDS * maps_per_s))
    ratios = []
    for _ in range(PROCESS_ROUNDS):
        one, two = (processes_rate(architecture, number, size=size, count=count, effort=effort)
                    for number in (1, 2))
        ratios.append(two / one)
    return statistics.median(ratios)


def run(*, device: str = "cpu", models: Sequence[str] = MODELS, images: int | None = None,
        size: int = 32, shap_images: int = 2, rounds: int = 5, max_evals: int = 2000,
        batch_size: int = 50, processes: bool = True) -> dict[str, Case]:
    """Measure each model and print a line for each.

    Args:
        device: As torch names it.
        models: lenet5 or names of timm models.
        images: Images that are explained in a round. None for 64 of lenet5 and 32 of others on a
            CPU, where 32 are in flight as in every process that makes maps, and for 512 on a GPU.
        size: Their side in pixels.
        shap_images: Images that shap explains in a round.
        rounds: Number of rounds.
        max_evals: Evaluations for each image.
        batch_size: The explainers' setting of this name.
        processes: Whether two processes are compared with one (on a CPU only).

    Returns:
        The measurements by model.
    """
    _as_a_worker()
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU, one thread"
    print(f"maps on {name}: {size}x{size} images, {max_evals} evaluations, explainer batch "
          f"{batch_size}, medians of {rounds} rounds in turn\n"
          "of limit: evaluations per second as a share of the forward pass alone; unsplit: the "
          "same with the first layer run on each masked image; peak MiB: of a process that "
          "explains these images, and then four times as many, with a memory limit of "
          f"{MEMORY >> 20} MiB\n{HEAD}")
    cases = {}
    for model in models:
        count = images or (512 if device != "cpu" else 64 if model == "lenet5" else 32)
        cases[model] = measure(
            model, images=count, size=size, shap_images=shap_images, rounds=rounds, device=device,
            effort=Effort(max_evals, batch_size), processes=processes)
        print(cases[model].line(), flush=True)
    return cases
