"""`python -m polyak COMMAND …`, the same as `polyak COMMAND …`."""

import sys

from polyak.cli.main import main

sys.exit(main())
