"""Keys in two bits: how near they are, and products of theirs that no order of additions changes."""

from __future__ import annotations

import torch

from linspec.quantization.two_bit import encode, products


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def decoded(keys: torch.Tensor) -> torch.Tensor:
    least, greatest, codes = (each.double() for each in encode(keys))
    return least[..., None, :] + codes * ((greatest - least) / 3)[..., None, :]


def test_a_code_is_the_nearest_of_four() -> None:
    keys = drawn(3, 2, 64, 30)
    least, greatest, codes = encode(keys)
    assert (least <= keys.amin(-2)).all() and (greatest >= keys.amax(-2)).all()
    assert codes.unique().tolist() == [0, 1, 2, 3]
    half = ((greatest - least) / 6)[..., None, :] * (1 + 1e-4)
    assert ((decoded(keys) - keys).abs() <= half).all()


def test_a_feature_that_is_the_same_in_all_keys_is_kept() -> None:
    keys = drawn(64, 8)
    keys[:, 3], keys[:, 5] = 0.75, 0.0
    assert torch.equal(decoded(keys)[:, [3, 5]].float(), keys[:, [3, 5]])
    assert products(torch.ones(2, 8), keys).isfinite().all()
    assert products(torch.zeros(1, 8), keys).tolist() == [0.0]


def test_products_are_those_of_decoded_keys() -> None:
    """A query meets codes with 127 steps to its largest part."""
    queries, keys = drawn(4, 5, 80), drawn(4, 64, 80)
    exact = (queries.double() @ decoded(keys).mT).amax(-1)
    least, greatest, _ = encode(keys)
    step = (queries * ((greatest - least) / 3)[:, None]).abs().amax(-1) / 127
    assert ((products(queries, keys) - exact).abs() <= 80 * 3 * step / 2).all()
    torch.testing.assert_close(products(queries, keys).double(), exact, rtol=0.02, atol=0.02)


def test_what_a_page_has_does_not_depend_on_what_is_beside_it() -> None:
    queries, keys = drawn(1, 7, 64), drawn(6, 64, 64)
    together = products(queries, keys)
    for page in range(6):
        assert torch.equal(together[page], products(queries[0], keys[page]))
        for query in range(7):
            alone = products(queries[0, query : query + 1], keys[page])
            assert torch.equal(together[page, query], alone[0])
