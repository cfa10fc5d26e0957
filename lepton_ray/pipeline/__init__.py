"""The only place that wires the layers: plan, tune, train, record, gate, serve."""
