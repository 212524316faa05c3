"""``python -m tprl_env.cli``: the command where no script is installed."""

import sys

from tprl_env.cli import main

if __name__ == "__main__":
    sys.exit(main())
