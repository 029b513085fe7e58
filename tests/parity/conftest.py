"""The reference implementation, kept to one thread and off the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def quiet_reference() -> Iterator[None]:
    """One torch thread, which leaves its order of summation to no scheduler, and no bars."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()
