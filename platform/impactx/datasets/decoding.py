"""From encoded images to uint8 RGB, by a bounded number of threads and blocks in memory."""

from __future__ import annotations

import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from impactx.datasets.errors import DataError

Raw = bytes | Path | np.ndarray
"""An image as a source hands it over: encoded bytes, a file, or uint8 of shape (H, W, 3)."""

BLOCK = 32  # images decoded by one task
THREADS = 8  # at most
ORIENTATION = 0x0112  # EXIF's tag; 1: as it is stored, 2 to 8: to be mirrored or turned

_NAMES = {
    "1": "grey", "L": "grey", "LA": "grey with alpha", "La": "grey with alpha", "P": "palette",
    "PA": "palette", "RGBA": "RGBA", "RGBa": "RGBA", "I;16": "16-bit grey",
    "I;16L": "16-bit grey", "I;16B": "16-bit grey", "RGB": "RGB with transparency"}


class Decoded(NamedTuple):
    """One decoded image.

    Attributes:
        image: uint8 of shape (H, W, 3).
        kind: The pixel format it was converted from ("grey", "RGBA", ...), None for plain RGB.
        resized: Its (height, width) before it was resized, None if it was not.
        turned: Whether it was mirrored or turned, because its EXIF orientation says so.
    """

    image: np.ndarray
    kind: str | None
    resized: tuple[int, int] | None
    turned: bool = False


def decode(raw: Raw, size: int | None = None) -> Decoded:
    """Decode one image.

    It is turned as its EXIF orientation says (cameras store what they see and note how they were
    held), and seen as people see it. Transparent parts are laid over black; 16-bit grey keeps its
    upper 8 bits; other modes go through Pillow's conversion.

    Args:
        raw: The image.
        size: Side in pixels of the square to which it is resized (bilinear, antialiased; the aspect
            ratio is not kept). None: it keeps its size.

    Raises:
        DataError: The data are not an image or cannot be converted. The message does not name the
            image.
    """
    if isinstance(raw, np.ndarray):
        if raw.dtype != np.uint8 or raw.ndim != 3 or raw.shape[2] != 3:
            raise DataError(f"is an array of {raw.dtype} and shape {raw.shape}: its source must "
                            "give uint8 of shape (H, W, 3)")
        if size is None or raw.shape[:2] == (size, size):
            return Decoded(raw, None, None)
        resized = Image.fromarray(raw).resize((size, size), Image.Resampling.BILINEAR)
        return Decoded(np.asarray(resized), None, (raw.shape[0], raw.shape[1]))
    try:
        with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as image:
            image.load()
            kind = None if image.mode == "RGB" and "transparency" not in image.info else (
                _NAMES.get(image.mode, f"mode {image.mode}"))
            turned = _upright(image)
            rgb, before = _to_rgb(image), None
            if size is not None and rgb.size != (size, size):
                before = (rgb.height, rgb.width)
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
            return Decoded(np.asarray(rgb), kind, before, turned)
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged data
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown format" if unknown else str(error)
        raise DataError(f"cannot be read as an image ({reason})") from error


def _upright(image: Image.Image) -> bool:
    """Mirror and turn a loaded image, in place, as its EXIF orientation says.

    Returns:
        Whether that was needed.
    """
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF data may be damaged while the pixels are fine; Pillow raises any type
        return False
    if orientation not in range(2, 9):
        return False
    ImageOps.exif_transpose(image, in_place=True)
    return True


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise DataError(f"has the pixel mode {image.mode} (32 bit), whose range is unknown: "
                        "convert it to 8-bit RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_blocks(raws: Iterable[Raw], where: Callable[[int], str], size: int | None,
                  kinds: Counter[str], sizes: Counter[tuple[int, int]], turned: Counter[bool]
                  ) -> Iterator[list[np.ndarray]]:
    """Decode many images in their order, by threads.

    No more blocks than threads + 1 are in memory.

    Args:
        raws: The images.
        where: Returns the name of the image at a position, for an error.
        size: As in `decode`.
        kinds: Counts here what was converted, by the format before.
        sizes: Counts here what was resized, by (height, width) before.
        turned: Counts here what was turned by its EXIF orientation.

    Yields:
        Lists of at most BLOCK images, uint8 of shape (H, W, 3).

    Raises:
        DataError: An image is bad; the message names the first such one.
    """
    threads = min(THREADS, _cpus())
    raws = iter(raws)
    start = 0
    waiting: deque[Future[list[Decoded]]] = deque()

    def work(first: int, block: list[Raw]) -> list[Decoded]:
        done = []
        for offset, raw in enumerate(block):
            try:
                done.append(decode(raw, size))
            except DataError as error:
                raise DataError(f"{where(first + offset)} {error}") from error.__cause__
        return done

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            while True:
                block = list(islice(raws, BLOCK))
                if block:
                    waiting.append(pool.submit(work, start, block))
                    start += len(block)
                if not waiting:
                    return
                if not block or len(waiting) > threads:
                    done = waiting.popleft().result()
                    kinds.update(decoded.kind for decoded in done if decoded.kind)
                    sizes.update(decoded.resized for decoded in done if decoded.resized)
                    turned.update(decoded.turned for decoded in done if decoded.turned)
                    yield [decoded.image for decoded in done]
        finally:
            for future in waiting:
                future.cancel()


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
