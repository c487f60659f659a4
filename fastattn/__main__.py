"""`python -m fastattn`: see `fastattn.cli`."""

import sys

from fastattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
