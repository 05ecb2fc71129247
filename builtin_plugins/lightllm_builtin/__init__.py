"""The plugins that come with lightllm-serve. Each subpackage is one plugin: its __init__ declares, siblings do the work."""
