"""What all tests on a GPU need."""

import warnings

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def context_of_autograd() -> None:
    """Let autograd's thread begin to use the GPU: the first product there makes a warning, which fails a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = torch.ones(2, 2, device="cuda", requires_grad=True)
        (matrix @ matrix).sum().backward()  # type: ignore[no-untyped-call]
