"""Optional commands on top of pipedream_simple.py: python -m pipedream lists them."""

import sys

if sys.argv[:1] == ["-m"] and not {"pipedream", "-mpipedream"} & {*sys.orig_argv}:
    print("this file is not a command: python -m pipedream lists them", file=sys.stderr)
    sys.exit(2)
