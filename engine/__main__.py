"""`python -m engine`: the command line with its scheduler."""

import sys

from engine.imports import swift_imports

with swift_imports():
    from engine.cli import main
    from engine.scheduler import Scheduler

sys.exit(main(sys.argv[1:], Scheduler))
