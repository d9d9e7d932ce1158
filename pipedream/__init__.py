"""Optional commands on top of pipedream_simple.py: python -m pipedream lists them."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m: only this package itself, and other people's modules
    flag, *rest = (word for word in sys.orig_argv[1:] if "m" in word)  # -m, or -Bmpipedream
    name = flag.partition("m")[2] or rest[0]
    if name.startswith("pipedream.") and name != "pipedream.__main__":
        print("this file is not a command: python -m pipedream lists them", file=sys.stderr)
        sys.exit(2)
