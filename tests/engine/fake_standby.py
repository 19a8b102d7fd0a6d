"""A process in standby that need not import anything, and works as fake_worker.py does."""

from __future__ import annotations

import sys
import tempfile
from functools import partial

from engine import worker
from engine.runners import standby
from tests.engine import fake_worker

if __name__ == "__main__":
    worker.import_pipeline = tempfile.gettempdir  # type: ignore[assignment]  # as some library might ask
    worker.main = partial(worker.main, pipeline=fake_worker.pipeline)
    sys.exit(standby.main())
