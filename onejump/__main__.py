"""`python -m onejump` is the command `onejump`."""

import sys

from onejump.cli import main

sys.exit(main())
