"""Exports are read back by `transformers`, whose progress bars nobody reads."""

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()
