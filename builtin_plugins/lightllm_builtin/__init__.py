"""The plugins that come with lightllm-serve, one per subpackage: its __init__ declares, its siblings do the work."""
