"""Training data: Grain pipelines over videos."""
