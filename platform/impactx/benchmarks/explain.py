"""How fast maps are made, as ratios in one run: against the raw forward, and against shap itself.

The raw forward is the limit of an engine that runs the model on each mask: the same model in its fastest form
(as it is, channels-last, frozen) at its fastest batch size, on inputs that are already there. Which that is, short
runs of all forms say; the best three then run as long as is worth comparing. shap explains the same images with the
same settings, at its own best: the model in that same fastest form, one masker for all images. All of them take turns,
the limit before and after ours, whose speed it is the mean of: a machine's own speed drifts while maps are made. Ratios
are taken within a round, and their medians are given.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from impactx.benchmarks.train import random_images
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.partition.engine import partition_shap
from impactx.explain.partition.fast import fast_score
from impactx.models import build_classifier
from impactx.settings import ModelSettings

MODELS = ("lenet5", "mobilenetv1_100", "tf_efficientnet_b2")
MEMORY = 2**29  # the setting cluster.explain_memory_mb's default
FORWARD_BATCHES = {"cpu": (50, 100, 200, 400), "cuda": (512, 2048, 8192)}
SCREEN_SECONDS, LIMIT_SECONDS, CANDIDATES = 0.3, 2.0, 3
PROCESS_ROUNDS, PROCESS_SECONDS = 3, 10.0
HEAD = (f"{'model':24} {'maps/s':>8} {'evals/s':>9} {'limit':>9} {'of limit':>9} {'unsplit':>8} {'shap maps/s':>12} "
        f"{'x shap':>7} {'2 proc/1':>9} {'peak MiB':>9} {'4x images':>9}")


def _as_a_worker() -> None:
    """A process like those that make maps; the limit and shap are measured in one as well."""
    torch.set_num_threads(1)
    keep_freed_memory()


def _model(architecture: str, size: int, device: str) -> nn.Module:
    settings = ModelSettings(name="measured", architecture=architecture)
    return build_classifier(settings, 10, (size, size), seed=0, load_weights=False).to(device).eval()


def _seconds(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _forms(model: nn.Module, shape: tuple[int, int, int], device: str) -> dict[str, Callable[[float], float]]:
    """Each form and batch size of the raw forward: called with how many seconds it may run, it gives evaluations a
    second.
    """
    frozen = fast_score(model, shape, split=False)
    rearranged = copy.deepcopy(model).to(memory_format=torch.channels_last)
    measured: dict[str, Callable[[float], float]] = {}
    for batch in FORWARD_BATCHES["cpu" if device == "cpu" else "cuda"]:
        inputs = torch.rand((batch, *shape), device=device)
        last = inputs.to(memory_format=torch.channels_last)
        ways = ("as it is", model, inputs), ("channels-last", rearranged, last), ("frozen", frozen, inputs)
        for name, form, x in ways:
            def rate(seconds: float, form: Callable[[Tensor], Tensor] = form, x: Tensor = x) -> float:
                with torch.inference_mode():
                    once = _seconds(lambda: form(x), device)
                    calls = max(1, round(seconds / once))
                    return len(x) * calls / _seconds(lambda: [form(x) for _ in range(calls)], device)

            measured[f"{name}, {batch}"] = rate
    return measured


def _shap_maps(score: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, settings: dict, device: str,
               masker: Any) -> None:
    import shap

    def numbers(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return score(torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)).cpu().numpy()

    explainer = shap.PartitionExplainer(numbers, masker)
    for image, label in zip(images, labels, strict=True):
        masker.last_xid = None  # shap's cache of the blur goes by id(), which a new image may have again
        explainer(image.permute(1, 2, 0).contiguous().numpy()[None], outputs=[int(label)], silent=True,
                  max_evals=settings["max_evals"], batch_size=settings["batch_size"])


def _worker(architecture: str, size: int, count: int, settings: dict, barrier: Any, queue: Any) -> None:
    _as_a_worker()
    model, (pixels, labels) = _model(architecture, size, "cpu"), random_images(count, size)
    score = fast_score(model, (3, size, size))
    partition_shap(score, pixels[:4], labels[:4], **settings)
    barrier.wait()
    queue.put(_seconds(lambda: partition_shap(score, pixels, labels, **settings), "cpu"))


def processes_rate(architecture: str, processes: int, *, size: int, count: int, settings: dict) -> float:
    """Maps a second of ``processes`` single-threaded processes that explain ``count`` images each, at once."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    arguments = (architecture, size, count, settings, barrier, queue)
    running = [context.Process(target=_worker, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    seconds = [queue.get(timeout=600) for _ in running]
    for process in running:
        process.join()
    return processes * count / max(seconds)


def _memory_worker(architecture: str, size: int, count: int, settings: dict, device: str, queue: Any) -> None:
    _as_a_worker()
    score = fast_score(_model(architecture, size, device), (3, size, size))
    peaks = []
    for images in (count, 4 * count):
        pixels, labels = random_images(images, size)
        partition_shap(score, torch.from_numpy(pixels).to(device), labels, memory_limit_bytes=MEMORY, **settings)
        peaks.append(torch.cuda.max_memory_allocated() / 2**20 if device != "cpu"
                     else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    queue.put(peaks)


def peak_memory(architecture: str, *, size: int, count: int, settings: dict, device: str) -> tuple[float, float]:
    """MiB at the peak of a process of its own that explains ``count`` images, and then four times as many.

    On a CPU all that the process holds, libraries and the maps included; on a GPU what torch holds there.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory_worker, args=(architecture, size, count, settings, device, queue))
    process.start()
    few, many = queue.get(timeout=900)
    process.join()
    return few, many


def measure(architecture: str, *, images: int, size: int, shap_images: int, rounds: int, device: str, max_evals: int,
            batch_size: int, processes: bool) -> dict[str, Any]:
    """Time all ways for one model, in turn. architecture: lenet5 or a timm name; images of ``size`` x ``size``."""
    import shap

    model, shape = _model(architecture, size, device), (3, size, size)
    pixels, classes = random_images(images, size)
    stack = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(classes)
    settings = {"max_evals": max_evals, "batch_size": batch_size}
    forms = _forms(model, shape, device)
    score, unsplit = fast_score(model, shape), fast_score(model, shape, split=False)
    masker = shap.maskers.Image("blur(16,16)", (size, size, 3))
    on_device = stack.to(device)
    ways = {"ours": score} | ({"unsplit": unsplit} if score.head is not None else {})
    for form in forms.values():
        form(0)  # warm: oneDNN makes its kernels
    partition_shap(score, on_device[:2], labels[:2], **settings)
    screened = {name: statistics.median(form(SCREEN_SECONDS) for _ in range(5)) for name, form in forms.items()}
    best = sorted(screened, key=lambda name: screened[name])[-CANDIDATES:]
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        limit = [{name: forms[name](LIMIT_SECONDS) for name in best}]
        found = {name: images / _seconds(lambda way=way: partition_shap(way, on_device, labels, **settings), device)
                 for name, way in ways.items()}
        limit.append({name: forms[name](LIMIT_SECONDS) for name in best})
        found |= {name: statistics.mean(one[name] for one in limit) for name in best}
        found["shap"] = shap_images / _seconds(
            lambda: _shap_maps(unsplit, stack[:shap_images], labels[:shap_images], settings, device, masker), device)
        for name, value in found.items():
            rates.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    fastest = max(best, key=lambda name: middle[name])

    def ratio(name: str, to: str, times: float = 1.0) -> float:
        return statistics.median(times * one / other for one, other in zip(rates[name], rates[to], strict=True))

    result: dict[str, Any] = {
        "model": architecture, "maps_per_s": middle["ours"], "evals_per_s": middle["ours"] * max_evals,
        "limit_evals_per_s": middle[fastest], "limit_form": fastest, "head_split": score.head is not None,
        "of_limit": ratio("ours", fastest, max_evals),
        "unsplit_of_limit": ratio("unsplit" if "unsplit" in ways else "ours", fastest, max_evals),
        "shap_maps_per_s": middle["shap"], "times_shap": ratio("ours", "shap"),
    }
    result["peak_mib"], result["peak_mib_4x"] = peak_memory(
        architecture, size=size, count=max(2, images // 4), settings=settings, device=device)
    if processes and device == "cpu":
        count = max(2, round(PROCESS_SECONDS * middle["ours"]))
        pairs = [[processes_rate(architecture, n, size=size, count=count, settings=settings) for n in (1, 2)]
                 for _ in range(PROCESS_ROUNDS)]
        one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
        result |= {"one_process_maps_per_s": one, "two_processes_maps_per_s": two,
                   "two_over_one": statistics.median(two / one for one, two in pairs)}
    return result


def _line(found: dict[str, Any]) -> str:
    two = f"{found['two_over_one']:9.2f}" if "two_over_one" in found else f"{'-':>9}"
    return (f"{found['model']:24} {found['maps_per_s']:8.2f} {found['evals_per_s']:9.0f} "
            f"{found['limit_evals_per_s']:9.0f} {found['of_limit']:9.2f} {found['unsplit_of_limit']:8.2f} "
            f"{found['shap_maps_per_s']:12.3f} {found['times_shap']:7.1f} {two} {found['peak_mib']:9.0f} "
            f"{found['peak_mib_4x']:9.0f}"
            f"   ({found['limit_form']}; {'first layer split off' if found['head_split'] else 'not split'})")


def run(*, device: str = "cpu", models: Sequence[str] = MODELS, images: int | None = None,
        size: int = 32, shap_images: int = 2, rounds: int = 5, max_evals: int = 2000, batch_size: int = 50,
        processes: bool = True) -> dict[str, dict[str, Any]]:
    """Measure each model and print a line for each; returns the numbers by model.

    images: how many are explained a round; by default 64 for lenet5 and 32 for others on a CPU, 512 on a GPU.
        A CPU has 32 in flight, as wherever maps are made.
    processes: also compare two single-threaded processes with one (CPU only).
    """
    _as_a_worker()
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU, one thread"
    print(f"maps on {name}: {size}x{size} images, {max_evals} evaluations, explainer batch {batch_size}, medians of "
          f"{rounds} rounds in turn\nof limit: evals/s against the raw forward's; unsplit: the same with the first "
          f"layer run on each mask; peak MiB: of a process that explains them, and then four times as many, with a "
          f"memory limit of {MEMORY >> 20}\n{HEAD}")
    results = {}
    for model in models:
        count = images or (512 if device != "cpu" else 64 if model == "lenet5" else 32)
        results[model] = measure(model, images=count, size=size, shap_images=shap_images, rounds=rounds, device=device,
                                 max_evals=max_evals, batch_size=batch_size, processes=processes)
        print(_line(results[model]), flush=True)
    return results
