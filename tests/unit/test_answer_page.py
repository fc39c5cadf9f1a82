"""An answer as a page: phrases in their colours, everything it holds shown as text."""

import base64
import io
import re

import numpy as np
from PIL import Image

from model.answers import Answer, mask_box
from model.overlay import draw_overlay, target_colour
from utils.serving.answer_page import answer_page, split_phrases


def answer(marked_text: str, phrases: list[str]) -> Answer:
    masks = np.zeros((len(phrases), 20, 30), bool)
    for number, mask in enumerate(masks):
        mask[number : number + 3, 2:5] = True
    boxes = [mask_box(mask) for mask in masks]
    return Answer(marked_text, marked_text, phrases, masks, [0.5] * len(masks), boxes, [9] * len(masks), 0)


def test_pieces_of_a_text() -> None:
    text = "The red circle {seg} and a circle {seg}, {seg}."
    parts = split_phrases(text, ["red circle", "circle", ""])
    assert parts == [("The ", None), ("red circle", 0), (" ", None), (" and a ", None), ("circle", 1), (" ", None),
                     (", ", None), (".", None)]  # fmt: skip
    assert split_phrases("None.", []) == [("None.", None)]
    # By the release's rule the question's targets come first and have no words here.
    assert split_phrases("it {seg}", ["", "it"])[0] == ("it", 1)


def test_a_page_shows_phrases_in_the_colours_of_their_masks() -> None:
    one = answer("The red circle {seg} and the star {seg}.", ["The red circle", "the star"])
    image = np.full((20, 30, 3), 200, np.uint8)
    page = answer_page(image, one, "Where?")
    for number, phrase in enumerate(one.phrases):
        assert page.count(f'<mark style="background: rgb{target_colour(number)};') == 2  # in the text and in the table
        assert page.count(f">{phrase}</mark>") == 2
    found = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", page)]
    shown = [np.asarray(Image.open(io.BytesIO(data))) for data in found]
    assert np.array_equal(shown[0], image) and np.array_equal(shown[1], draw_overlay(image, one.masks, one.phrases))
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page and "<b>Q</b> Where?" in page


def test_nothing_in_an_answer_is_markup() -> None:
    hostile = '<script>alert(1)</script> & "x" \x1b[31m'
    page = answer_page(np.zeros((20, 30, 3), np.uint8), answer(hostile + " {seg}", [hostile.strip()]), hostile)
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "<table>" not in answer_page(np.zeros((20, 30, 3), np.uint8), answer("None.", []))
