"""Colours of languages: fixed, legible, and apart for every kind of colour vision."""

import itertools

import numpy as np
import pytest

from gamayun_jax.report import colours
from gamayun_jax.tables import LANGUAGES

# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour: str) -> np.ndarray:
    """Linear RGB of "#rrggbb"."""
    s = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson (2020): distances are about as large as they seem."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return lab @ np.cbrt(cones @ np.clip(rgb, 0, 1))


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("palette", [colours.LIGHT, colours.DARK])
@pytest.mark.parametrize("vision", VISIONS)
def test_colours_are_apart_for_every_colour_vision(palette, vision):
    """By three times of what is just noticed (0.02); for most readers by six."""
    seen = [oklab(np.array(VISIONS[vision]) @ linear(x)) for x in palette]
    least = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert least > (0.12 if vision == "usual" else 0.06)


@pytest.mark.parametrize(
    ("palette", "paper"), [(colours.LIGHT, "#ffffff"), (colours.DARK, "#13171c")]
)
def test_colours_stand_out_from_the_page(palette, paper):
    """WCAG 2.2, 1.4.11: at least 3 to 1."""
    for colour in palette:
        dark, light = sorted((luminance(colour), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_a_language_has_one_colour_whatever_stands_beside_it():
    few, many = colours.colours_of(["tr", "ru"]), colours.colours_of(LANGUAGES)
    assert few == {k: many[k] for k in few}
    assert len({many[k] for k in LANGUAGES[:12]}) == 12
    for name in ("zh-Hant", "zh_TW", "zh/web", "ZH"):
        assert colours.colour_number(name) == colours.colour_number("zh")
    assert colours.colour_number("\ud800") in range(12)
