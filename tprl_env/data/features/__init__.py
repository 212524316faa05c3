"""Encoded samples: the feature store, the toy source, and the protocol that both have."""

from tprl_env.data.features.manifest import Manifest, StoreError, trust_files
from tprl_env.data.features.source import TokenSource
from tprl_env.data.features.store import FeatureStore, open_source, shared_source
from tprl_env.data.features.toy import ToyStore

__all__ = [
    "FeatureStore",
    "Manifest",
    "StoreError",
    "TokenSource",
    "ToyStore",
    "open_source",
    "shared_source",
    "trust_files",
]
