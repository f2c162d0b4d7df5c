"""The methods: LightningModules on the host's base class. See ``registry.method_classes`` for the names."""
