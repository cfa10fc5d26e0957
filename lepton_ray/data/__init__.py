"""Sources, splits, fitted preprocessing, and the order of samples."""

from lepton_ray.data.dataset import Dataset, Samples, load
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.schema import Column, Schema

__all__ = ["Column", "Dataset", "Preprocess", "Samples", "Schema", "load"]
