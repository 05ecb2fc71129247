"""LightLLM's own line: `python -m lightllm.server.api_server --model_dir DIR --port 8088 --tp 1`.

The same as `lightllm-serve`, but, as LightLLM's server does, it answers to every model name unless one was given.
"""

import sys

from lightllm.cli import main

if __name__ == "__main__":
    sys.exit(main(lightllm_names=True))
