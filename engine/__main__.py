"""`python -m engine`: the command line with its scheduler."""

import sys

from engine.cli import main
from engine.scheduler import Scheduler

sys.exit(main(sys.argv[1:], Scheduler))
