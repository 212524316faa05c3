"""From a dataset and an LVLM to a feature store."""
