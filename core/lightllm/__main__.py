"""`python -m lightllm` is `lightllm-serve`."""

import sys

from lightllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
