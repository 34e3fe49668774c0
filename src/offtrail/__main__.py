"""`python -m offtrail`: the same command as `offtrail` and `python launch.py`."""

import sys

from offtrail.platform.launcher.command import console

sys.exit(console())
