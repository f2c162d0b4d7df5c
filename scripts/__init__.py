"""Entry points, installed as ``dinovmf_plugin.scripts``."""
