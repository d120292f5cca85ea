"""Maskers: what they show, what they are called, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from impactx.explain.masking import Blur, Constant, MaskerError, parse_masker


def test_blur_of_one_bright_pixel_is_off_centre_for_even_kernels() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    blurred = parse_masker("blur(2,4)").background(image)[0, 0]
    # the window of a pixel starts kernel // 2 before it: a bright pixel at 4 reaches columns 4..5 and rows 3..6
    expected = torch.zeros(9, 9)
    expected[3:7, 4:6] = 1 / 8
    torch.testing.assert_close(blurred, expected, rtol=0, atol=0)


def test_blur_mirrors_the_border_without_repeating_it() -> None:
    image = torch.tensor([[[[0.0, 0.2, 0.8, 1.0]]]])
    blurred = parse_masker("blur(3,1)").background(image)[0, 0, 0]
    expected = torch.tensor([(0.2 + 0.0 + 0.2) / 3, 1.0 / 3, 2.0 / 3, (0.8 + 1.0 + 0.8) / 3])
    torch.testing.assert_close(blurred, expected)


def test_blur_with_a_kernel_larger_than_the_image_keeps_a_flat_image_flat() -> None:
    image = torch.full((2, 3, 5, 4), 0.3)
    torch.testing.assert_close(parse_masker("blur(16,31)").background(image), image)


def test_blur_is_a_mean_and_stays_in_the_type() -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    blurred = Blur(16, 16).background(images)
    assert blurred.dtype == torch.float64
    assert blurred.min() >= images.min() and blurred.max() <= images.max()
    assert blurred.std() < images.std()


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("blur(16,16)", "blur(16,16)"), (" blur( 3 , 5 ) ", "blur(3,5)"), (0.5, "constant(0.5)"), (0, "constant(0)"),
        ("0.25", "constant(0.25)"), ("0.1,0.2", "constant(0.1,0.2)"), ((0.1, 0.2, 0.3), "constant(0.1,0.2,0.3)"),
        ("constant(0.5, 1)", "constant(0.5,1)"), (np.array([0.5, 0.25]), "constant(0.5,0.25)"),
    ],
)
def test_canonical_names(spec: object, name: str) -> None:
    masker = parse_masker(spec)
    assert masker.name == name
    assert parse_masker(masker.name) == masker
    assert parse_masker(masker) is masker


def test_constant_colours_fill_their_channels() -> None:
    background = parse_masker((0.1, 0.2, 0.3)).background(torch.rand(2, 3, 4, 5))
    assert background.shape == (2, 3, 4, 5)
    for channel, value in enumerate((0.1, 0.2, 0.3)):
        assert (background[:, channel] == torch.tensor(value)).all()
    assert (Constant((1.0,)).background(torch.zeros(1, 4, 2, 2)) == 1).all()


@pytest.mark.parametrize(
    "spec",
    ["blur(16)", "blur(0,3)", "blur(-2,3)", "blur", "inpaint_telea", "", "0.5;0.5", "1.5", "nan", -0.1, (0.1, 2.0), [],
     None, True, object(), ["a"], "constant()"],
)
def test_what_is_not_a_masker_is_refused_by_name(spec: object) -> None:
    with pytest.raises(MaskerError) as raised:
        parse_masker(spec)
    assert "masker" in str(raised.value)


def test_a_colour_that_does_not_fit_the_channels_is_refused() -> None:
    with pytest.raises(MaskerError, match=r"constant\(0\.1,0\.2,0\.3\) has 3 channel values, the images have 1"):
        parse_masker((0.1, 0.2, 0.3)).background(torch.rand(1, 1, 4, 4))


def test_images_of_bytes_are_refused() -> None:
    with pytest.raises(MaskerError, match="uint8"):
        parse_masker("blur(3,3)").background(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
