"""MoRF as its description reads, image by image and region by region, one forward at a time, in plain Python."""

from __future__ import annotations

import math

import numpy as np
import torch


def slow_curves(score, image, noise, relevance_map, side):
    """Probabilities and logits of the class predicted for `image` (C, H, W), after 0, 1, ... regions were replaced.

    relevance_map: (C, H, W), of any number of channels. Regions are side x side, cut at the border.
    """
    _, height, width = image.shape
    corners = [(top, left) for top in range(0, height, side) for left in range(0, width, side)]
    sums = []
    for top, left in corners:
        total = 0.0
        for y in range(top, min(top + side, height)):
            for x in range(left, min(left + side, width)):
                total += sum(float(plane[y, x]) for plane in relevance_map)
        sums.append(total)
    order = sorted(range(len(corners)), key=lambda i: -sums[i])  # stable
    current = np.array(image)
    scores = _scores(score, current)
    predicted = max(range(len(scores)), key=lambda k: scores[k])
    probabilities, logits = [_softmax(scores)[predicted]], [scores[predicted]]
    for region in order:
        top, left = corners[region]
        for y in range(top, min(top + side, height)):
            for x in range(left, min(left + side, width)):
                current[:, y, x] = noise[:, y, x]
        scores = _scores(score, current)
        probabilities.append(_softmax(scores)[predicted])
        logits.append(scores[predicted])
    return probabilities, logits, predicted, order


def slow_aopc(curve, steps):
    return sum(curve[0] - curve[k] for k in range(steps + 1)) / (steps + 1)


@torch.no_grad()
def _scores(score, image):
    return score(torch.from_numpy(np.array(image))[None])[0].double().tolist()


def _softmax(scores):
    top = max(scores)
    total = sum(math.exp(s - top) for s in scores)
    return [math.exp(s - top) / total for s in scores]
