"""Seconds of products: which cells there are, which matrices count how much, and what is left of a limit."""

import pytest

from trilemma.core.errors import LimitError
from trilemma.search.product_seconds import ProductSeconds, time_products


def test_every_fitting_shape_and_format_is_timed(tiny_model):
    model = tiny_model(dim=256, ffn=80, heads=4, head_dim=64)
    names = model.config.linear_names()
    found = time_products(model, names, ("int8-g32", "int4-g32-k"), "int8-g32", 1e6, threads=1)
    shapes = {model.config.tensor_shapes()[name] for name in names}
    long = {shape for shape in shapes if shape[1] == 256}  # two levels of scales need such rows
    assert set(found.cells) == {(s, "int8-g32") for s in shapes} | {(s, "int4-g32-k") for s in long}
    assert all(seconds > 0 for seconds in found.cells.values())
    products = sum(found.of(name, "int8-g32") for name in names)
    assert found.step_s > 0.5 * products  # the same products, from the same cache
    assert found.limit(10 * found.step_s, names) == pytest.approx(9 * found.step_s + products)


def test_looked_up_rows_cost_nothing_and_experts_their_share(tiny_model, random_model, experts_config):
    untied = tiny_model(tied=False).config
    cells = {((97, 48), "int8-g32"): 2.0, ((48, 80), "int8-g32"): 1.0}
    found = ProductSeconds(untied, cells, step_s=10.0, floor="int8-g32")
    assert found.of("embedding.weight", "int8-g32") == 0
    assert found.of("head.weight", "int8-g32") == 2.0
    assert found.of("layers.0.ffn.down.weight", "int8-g32") == 1.0
    config = experts_config()
    ffn = config.layers[0].ffn
    name = next(name for name in config.linear_names() if ".experts." in name)
    shape = config.tensor_shapes()[name]
    among = ProductSeconds(config, {(shape, "int8-g32"): 8.0}, step_s=10.0, floor="int8-g32")
    assert among.of(name, "int8-g32") == pytest.approx(8.0 * ffn.active / ffn.count)


def test_a_token_can_not_take_less_than_what_is_not_a_product(tiny_model):
    found = ProductSeconds(tiny_model().config, {((97, 48), "int8-g32"): 2e-3}, step_s=5e-3, floor="int8-g32")
    assert found.limit(4e-3, ["embedding.weight"]) == pytest.approx(1e-3)
    for wrong in (3e-3, -1.0, float("nan"), float("inf")):
        with pytest.raises(LimitError, match="without any product it takes 3 ms"):
            found.limit(wrong, ["embedding.weight"])
