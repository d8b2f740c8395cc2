"""What capturing every MLP's neurons adds to a forward of an OPT-125M-shaped model, on one thread."""

from collections.abc import Callable

import torch

from pyfacts import bench


def test_capture(compare: Callable[..., None]) -> None:
    token_ids = torch.randint(5, 50000, (4, 512), generator=torch.Generator().manual_seed(0))
    compare(bench.capture_case(bench.opt(), token_ids), rounds=5)
