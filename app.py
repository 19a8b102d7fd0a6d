"""Maquette's dashboard: open the store, start the scheduler, launch the page."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from engine.imports import swift_imports

with swift_imports():
    from engine.errors import MaquetteError
    from engine.modes import check_address, limits_of, mode_of
    from engine.scheduler import Scheduler
    from engine.store import home
    from ui.page import build
    from ui.server import address, check_free, serve

SETTINGS = """It takes no arguments; the environment says the rest:
  HOST, PORT        where it listens (127.0.0.1, 7860)
  MAQUETTE_HOME     the folder of runs and models
  MAQUETTE_MODE     local, team or public; docs/serving.md lists the limits of each
"""


def main() -> int:
    """Serve until stopped; returns the exit code."""
    argparse.ArgumentParser(
        description=__doc__, epilog=SETTINGS, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    host, port = address()
    if os.getpid() == 1:  # of a container: Linux lets its first process ignore the signal that stops it
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        mode = mode_of(os.environ)
        check_address(mode, host)
        check_free(host, port)
        with Scheduler(home(), limits=limits_of(mode, os.environ), standby=True) as scheduler:
            page, desk = build(scheduler.store, scheduler, mode=mode)
            serve(page, desk, host, port)
    except KeyboardInterrupt:
        return 0
    except MaquetteError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
