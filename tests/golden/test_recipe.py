"""The weight recipe against the recorded check values; everything else in the golden set rests on it."""

from tests.golden import recipe, vectors


def test_recipe_gives_the_check_values() -> None:
    weights = vectors.read_json("weights")
    tables = {**weights["model_tensors"], **weights["clip_tensors"]}
    assert weights["check_values"], "weights.json holds no check values"
    for name, expected in weights["check_values"].items():
        entry = tables[name]
        tensor = recipe.make_tensor(weights["seed"], name, entry["shape"], entry["center"], entry["scale"]).flatten()
        first, last = expected["first4"], expected["last2"]
        assert tensor[: len(first)].tolist() == first, name
        assert tensor[-len(last) :].tolist() == last, name
        assert tensor.double().sum().item() == expected["sum_float64"], name


def test_pixels_outside_the_image_are_zero() -> None:
    entry = {"name": "any", "shape": [2, 3, 6, 6], "center": 5.0, "scale": 1.0}
    pixels = recipe.make_pixels(7, entry, [(4, 6), (6, 2)])
    assert (pixels[0, :, :4] >= 4).all() and (pixels[0, :, 4:] == 0).all()
    assert (pixels[1, :, :, :2] >= 4).all() and (pixels[1, :, :, 2:] == 0).all()
