"""Times the operator: python benchmarks/operator.py [--help]. What is timed, and against what, is in line_scan.py."""

import os
import sys

# A script run by its path puts this folder first on sys.path, where this file hides the standard library's `operator`.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(HERE) if os.path.abspath(path) == HERE else path for path in sys.path]

if __name__ == "operator":  # another script of this folder asked for the standard library's: hand it over
    del sys.modules["operator"]
    import operator  # noqa: F401
else:
    from benchmarks.line_scan import main

    main()
