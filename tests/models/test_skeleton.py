"""Modules that wait for their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linspec.models.skeleton import without_memory


def test_loading_does_not_import_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing values on the meta device imported torch._dynamo: a second, and 60 MB that stayed."""

    def drawn(*args: object, **kwargs: object) -> None:
        raise AssertionError("values were drawn")

    monkeypatch.setattr(torch.Tensor, "normal_", drawn)
    monkeypatch.setattr(torch.Tensor, "uniform_", drawn)
    with without_memory():
        modules = [nn.Embedding(5, 4), nn.Linear(4, 3)]
        inits = torch.empty(2, 2)
        assert nn.init.normal_(inits) is inits
    assert all(parameter.is_meta for each in modules for parameter in each.parameters())
    with pytest.raises(AssertionError, match="drawn"):
        nn.Linear(4, 3)
