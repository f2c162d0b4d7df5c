"""Hydra configs, installed as ``dinovmf_plugin.configs`` (``pkg://dinovmf_plugin.configs``)."""
